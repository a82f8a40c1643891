from importlib.metadata import distributions
from pathlib import Path

from keepstep.agent.rankenv import HOOK, Place, hooked, inherited, node_env, rank_env

# What torchrun 2.15 sets for a worker (local_elastic_agent.py), but for what is known only at go:
# MASTER_ADDR, MASTER_PORT, TORCHELASTIC_USE_AGENT_STORE. The shim adds those, as its own tests show.
TORCHRUN = {
    "LOCAL_RANK", "RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "LOCAL_WORLD_SIZE", "WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCHELASTIC_ERROR_FILE", "OMP_NUM_THREADS",
}  # fmt: skip
SECOND_OF_TWO = Place(job="llama-abcd", attempt=3, world_size=8, nodes=2, node_rank=1, ranks=(4, 5, 6, 7))


def test_the_whole_torchrun_set() -> None:
    shared = node_env(SECOND_OF_TWO, {}, interface="eth0", gpus=())
    own = rank_env(SECOND_OF_TWO, 2, error_file="/x/error-6.json")
    assert (shared | own).keys() >= TORCHRUN
    assert own == {
        "RANK": "6", "LOCAL_RANK": "2", "ROLE_RANK": "6", "TORCHELASTIC_ERROR_FILE": "/x/error-6.json",
    }  # fmt: skip
    assert {name: shared[name] for name in sorted(shared) if name.endswith("SIZE")} == {
        "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", "ROLE_WORLD_SIZE": "8", "WORLD_SIZE": "8",
    }  # fmt: skip
    assert shared["GROUP_RANK"] == "1"
    assert shared["TORCHELASTIC_RESTART_COUNT"] == "2"
    assert shared["TORCHELASTIC_RUN_ID"] == "llama-abcd"


def test_what_the_user_chose_stays_and_what_is_ours_does_not() -> None:
    given = {"OMP_NUM_THREADS": "7", "NCCL_SOCKET_IFNAME": "ib0", "WORLD_SIZE": "1", "MY": "own"}
    env = node_env(SECOND_OF_TWO, given, interface="eth0", gpus=())
    assert (env["OMP_NUM_THREADS"], env["NCCL_SOCKET_IFNAME"], env["MY"]) == ("7", "ib0", "own")
    assert (env["GLOO_SOCKET_IFNAME"], env["TP_SOCKET_IFNAME"]) == ("eth0", "eth0")
    assert env["WORLD_SIZE"] == "8"
    assert given["WORLD_SIZE"] == "1"  # the job's own is not written to


def test_ranks_see_all_gpus_of_their_job_and_no_others() -> None:
    env = node_env(SECOND_OF_TWO, {"CUDA_VISIBLE_DEVICES": "0"}, interface="", gpus=("GPU-c", "GPU-d"))
    assert env["CUDA_VISIBLE_DEVICES"] == "GPU-c,GPU-d"
    assert not any(name.endswith("IFNAME") for name in env)
    assert "CUDA_VISIBLE_DEVICES" not in node_env(SECOND_OF_TWO, {}, interface="", gpus=())


def test_one_rank_may_use_all_cores() -> None:
    alone = Place(job="j-abcd", attempt=1, world_size=1, nodes=1, node_rank=0, ranks=(0,))
    assert "OMP_NUM_THREADS" not in node_env(alone, {}, interface="lo", gpus=())


def test_an_outer_launch_and_our_own_secrets_are_not_passed_on() -> None:
    environ = {
        "PATH": "/bin", "RANK": "3", "MASTER_ADDR": "elsewhere", "TORCHELASTIC_RUN_ID": "x",
        "KEEPSTEP_TOKEN": "secret", "KEEPSTEP_ATTEMPT": "a/1/b", "NOTIFY_SOCKET": "/run/x",
    }  # fmt: skip
    assert inherited(environ) == {"PATH": "/bin"}


def test_only_the_built_in_trainer_gets_a_job_file() -> None:
    assert (
        rank_env(SECOND_OF_TWO, 0, error_file="e", job_file="/x/job.json")["KEEPSTEP_JOB_FILE"]
        == "/x/job.json"
    )
    assert "KEEPSTEP_JOB_FILE" not in rank_env(SECOND_OF_TWO, 0, error_file="e")


def test_the_hook_is_at_the_end_of_the_path_unless_it_is_turned_off() -> None:
    assert hooked({"A": "b"})["PYTHONPATH"] == str(HOOK)
    assert hooked({"PYTHONPATH": "/mine:/other"})["PYTHONPATH"] == f"/mine:/other:{HOOK}"
    assert hooked({"PYTHONPATH": "", "KEEPSTEP_HOOK": "0"}) == {"PYTHONPATH": "", "KEEPSTEP_HOOK": "0"}
    found = [one for here in distributions(path=[str(HOOK)]) for one in here.entry_points]
    assert [(one.group, one.value) for one in found] == [("torch.backends", "keepstep_hook:autoload")]
    assert Path(hooked({})["KEEPSTEP_BEACON_CODE"]).is_file()


def test_flight_recorders_and_ras_are_told_of_gpus_only() -> None:
    given = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "7"}
    here = {"flights": "/x/flight-", "ras_port": 4711}
    env = node_env(SECOND_OF_TWO, given, interface="", gpus=("GPU-c",), **here)  # type: ignore[arg-type]
    assert "TORCH_FR_BUFFER_SIZE" not in env  # the job has chosen, in an older word
    assert (env["TORCH_FR_DUMP_TEMP_FILE"], env["NCCL_RAS_ADDR"]) == ("/x/flight-", "127.0.0.1:4711")
    on_cpu = node_env(SECOND_OF_TWO, {}, interface="", gpus=(), **here)  # type: ignore[arg-type]
    assert not any(name.startswith(("TORCH_FR", "NCCL_RAS")) for name in on_cpu)
