"""How the clients of a round are asked, and what the strategy sees of their answers.

`plain` shows it every sound reply, or their mean; `buffered` the mean of those that come first, whoever is still at
work; `central` a noised mean that is released once; `summed` what secure aggregation lets anybody see. The coordinator
uses `choice` and the `base.Asking` that it gets.
"""
