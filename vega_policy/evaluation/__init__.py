"""Closed-loop evaluation: one batched policy, simulators in worker processes, statistics, videos, a report.

A row of the policy's batch is a *slot*. Slot s plays episodes s, s + N, s + 2N, ... and keeps its place in
the batch, so that a result depends on neither the number of processes nor on what was already played.
"""
