"""A Ray cluster as a pool. Ray places and keeps the agents; what they run is keepstep's as everywhere.

    pool      the contract's end, in the controller: what jobs want, what Ray says, who is told. No Ray in it
    groups    pure: from both, the placement groups and agents that should be
    words     what pool and driver say to each other
    driver    a process of its own that has Ray: looks, makes and removes until all is as wanted
    keeper    a detached actor for each node: starts the agent as its child, and ends it

A gang is one atomic placement group, its spares groups of one bundle each, so that Ray's autoscaler sees
what is missing and no two gangs hold half of what both need. They are there while their job is: agents on all
nodes all the time would keep a shared cluster from being used by others and from being scaled down.
Everything is found again by its name, which holds the controller's own id, so nothing is started twice and
two controllers do not see each other.
"""
