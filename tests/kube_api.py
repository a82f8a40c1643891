"""A real Kubernetes API server with its etcd, for tests of what is written there. Nothing else runs in it.

Programs `etcd` and `kube-apiserver` on the path, or one that is both (KEEPSTEP_TEST_KUBEBOX, called with the
name of either as its first word).
"""

import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

BOX = "KEEPSTEP_TEST_KUBEBOX"
MISSING = f"no etcd and kube-apiserver on this machine's path, and no {BOX}"
_START_WITHIN_S = 120.0


def programs() -> dict[str, list[str]] | None:
    """What each is started with; None: they are not here."""
    if box := os.environ.get(BOX):
        return {name: [box, name] for name in ("etcd", "kube-apiserver")}
    found = {name: shutil.which(name) for name in ("etcd", "kube-apiserver")}
    return {name: [path] for name, path in found.items() if path} if all(found.values()) else None


class KubeApi:
    """Listens on this machine only; its one user may do everything."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._token = folder, secrets.token_hex(16)
        self._processes: list[subprocess.Popen[bytes]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"https://127.0.0.1:{port}"
        self.kubeconfig = folder / "kubeconfig"
        try:
            self._start(port)
        except BaseException:
            self.close()
            raise

    def _start(self, port: int) -> None:
        key, tokens, store = (self._folder / name for name in ("sa.key", "tokens.csv", "etcd.sock"))
        command = ["openssl", "genrsa", "-out", str(key), "2048"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=60)
        tokens.write_text(f'{self._token},admin,admin,"system:masters"\n')
        self._spawn(
            "etcd", f"--data-dir={self._folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn",
            f"--listen-client-urls=unix://{store}", f"--advertise-client-urls=unix://{store}",
            "--listen-peer-urls=http://127.0.0.1:0",
        )  # fmt: skip
        self._spawn(
            "kube-apiserver", f"--etcd-servers=unix://{store}", "--bind-address=127.0.0.1",
            f"--secure-port={port}", "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none",
            f"--cert-dir={self._folder / 'certs'}", f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC", "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-signing-key-file={key}", f"--service-account-key-file={key}",
            "--service-cluster-ip-range=10.0.0.0/16", "--profiling=false",
        )  # fmt: skip
        deadline = time.monotonic() + _START_WITHIN_S
        while not self._ready():
            assert time.monotonic() < deadline, f"no Kubernetes within {_START_WITHIN_S} s: {self._folder}"
            assert all(process.poll() is None for process in self._processes), self._folder
            time.sleep(0.1)
        cluster = {"server": self.url, "certificate-authority": str(self._certificate)}
        self.kubeconfig.write_text(
            json.dumps({
                "apiVersion": "v1", "kind": "Config", "current-context": "test",
                "clusters": [{"name": "test", "cluster": cluster}],
                "users": [{"name": "admin", "user": {"token": self._token}}],
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            })
        )  # fmt: skip

    @property
    def _certificate(self) -> Path:
        return self._folder / "certs" / "apiserver.crt"

    def _spawn(self, name: str, *flags: str) -> None:
        found = programs()
        assert found is not None
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    [*found[name], *flags], cwd=self._folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            )

    def _ready(self) -> bool:
        try:
            return bool(self.call("GET", "/readyz") == b"ok")
        except OSError:
            return False

    def call(self, verb: str, path: str, body: Any = None, kind: str = "application/json") -> bytes:
        """As `kubectl --raw`. Errors: OSError, of which HTTPError is one."""
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}{path}", method=verb, data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._token}", "Content-Type": kind},
        )  # fmt: skip
        context = ssl.create_default_context(cafile=str(self._certificate))
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:  # noqa: S310
            return bytes(answer.read())

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
