"""`coterie server`: a long-lived coordinator. Runs wait in a queue, are carried out over the plane, and outlive it.

    state      the queue and what became of each run, in SQLite: what a restart goes on from
    audit      an append-only, hash-chained record of who came, what was asked and what was released
    board      what happens now, for those who watch
    runner     one run from its configuration to its result
    scheduler  which run starts when: in order, side by side where they share no site
    archive    a result as one sealed file for the operator
    desk       what operators are answered
    process    all of it together with the plane, started and ended

Only `server.service_cli` starts it. Operators reach it over the plane (`server.remote`).
"""
