"""Closed-loop evaluation: batched rollouts in worker processes, ablations, statistics, comparison, report.

A row of the policy's batch is one environment. With n environments, each runs a fixed stretch of the episodes
and keeps its row, so that results depend neither on the number of processes nor on interruptions.
"""
