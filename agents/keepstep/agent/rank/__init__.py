"""The rank side of the agent: what runs between an agent and the ranks, under the job's own interpreter.

Standard library only, and nothing of keepstep but the modules beside each other (relative imports): the job's
interpreter may have no keepstep. `__main__.py` is run by path and loads this folder under a private name, so
that no module of a script can be mistaken for one of ours. Python 3.10 or newer.

    protocol    what launch.json, the shim's socket and result.json say
    shim        owns the ranks of one attempt on one node; survives its agent
    spawn       one rank or one rendezvous store: fork, set up, exec or become
    become      a loaded process turns into the script, as if it had been started cold
    standby     a process with the imports loaded that forks shims
    rendezvous  the TCPStore of one attempt
    processes, marker, kill   who belongs to an attempt, and ending all of them
    logs        pipes to bounded files
    lines       JSON lines over a Unix socket
"""
