"""Consumers of a queue that delivers at least once, whose effects happen once.

`worker` is the program, `batch` the transaction in which a batch of deliveries is
worked on, `work` what is done about a message, `queue` the queue, and `producer`
what fills it.  The head of `batch` explains why it is right.
"""
