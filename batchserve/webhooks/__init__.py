"""Webhooks by Standard Webhooks: the ends of jobs are sent to endpoints of their tenant, or to an address on the job.

A delivery is a row, written in the transaction of the end (`outbox`). Threads of workers claim due ones (`deliverer`,
`deliveries`), sign them (`signing`) and send them (`outgoing`), until they are delivered or given up.
"""
