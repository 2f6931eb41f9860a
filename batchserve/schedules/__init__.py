"""Schedules: requests that are repeated at the times of a cron text.

Each process with a worker or an API has a `Scheduler`. When a time has come, one transaction advances the schedule and
writes the row of its tick: the guard of that row, and the unique pair of schedule and time, let one process do it. Then
a process claims the tick, replaces the placeholders of the request, and queues its jobs. The transaction that queues a
job also ends the tick: whatever is killed, and however many processes work on the tick, its job is queued once.
"""
