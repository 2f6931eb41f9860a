"""The code of scoring processes: pure functions of storage keys, called by every engine.

The server parses no user data and loads no model. Each function takes a task and gives a small answer; everything large
goes through storage.

`checks`, `planning`, `chunks` and `assembly` are the steps of a job, `small` all of them in one call. `conversion`,
`online`, `unpacking` and `admission` answer clients that wait, `preview` and `summary` their readers. What they share:
`inputs`, `artifacts` and `sessions`, which a process keeps, then `answers`, what the model says of records, and
`results`, how that is written down.
"""
