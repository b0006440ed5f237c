"""What separate machines cost; `suite` measures it, the other modules are its parts and the processes it starts."""
