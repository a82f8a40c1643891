"""What the training program writes beside training."""

from pathlib import Path

import pytest

from keepstep.llama.evaluation import Validation
from keepstep.llama.train import leave_evaluation

FOUND = Validation(step=40, loss=2.5, by_source={"code": 2.5})


def test_an_evaluation_that_cannot_be_recorded_fails_no_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KEEPSTEP_JOB_FILE", str(tmp_path / "job.json"))
    leave_evaluation(FOUND)
    file = tmp_path / "evaluations.jsonl"
    assert file.read_text() == '{"step": 40, "loss": 2.5, "by_source": {"code": 2.5}}\n'
    file.unlink()
    file.symlink_to("/dev/full")
    leave_evaluation(FOUND)
    assert f"the evaluation of step 40 is not recorded: {file}: No space left" in capsys.readouterr().err
