"""The carrier: keeps the snapshots of one job's ranks on one node, and copies for a buddy node.

One process for each job and node, started by the agent under the agent's interpreter. It outlives ranks,
attempts and agents; when it is killed, copies are lost and nothing else: ranks go on, and the next carrier
gets their memory files again with their next snapshot.

    rank ---- join, taken, restore (Unix socket, descriptors) ----.
    agent --- prepare, peers, held, end (the same socket) --------+-- server -- book -- memory
    other carriers -- have, put, get (TCP, a secret of the job) --'      '--- streams (to the buddy)

Nobody but the rank maps its slots: the carrier reads with sendfile and writes with pwrite, so nothing of them
is resident in it. What is not encrypted: a network that others listen on needs a tunnel.
"""
