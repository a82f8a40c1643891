"""Short real workloads that tell a sick node from a good one: `python -m keepstep.validate` on each rank."""
