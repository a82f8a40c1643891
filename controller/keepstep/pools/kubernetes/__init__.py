"""Nodes of a Kubernetes cluster. Whatever imports Kubernetes' client runs in a process of its own."""
