"""Values that only the node knows: secrets and sources of environment variables, by reference.

Kubernetes objects are read where the pod's template mounts them, one file a key.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import Path

from keepstep.core.errors import InputError
from keepstep.core.job import EnvSource, SecretRef

MOUNTED_SECRETS = Path("/etc/keepstep/secrets")  # <name>/<key>
MOUNTED_CONFIG = Path("/etc/keepstep/config")  # <name>/<variable>
_BYTES_MAX = 1 << 20


def resolve(
    sources: Iterable[EnvSource], secrets: Mapping[str, SecretRef], environ: Mapping[str, str]
) -> dict[str, str]:
    """Variables of a job's `env_from` and `secrets`. Errors: InputError; a message never holds a value."""
    env: dict[str, str] = {}
    for source in sources:
        env.update(_variables(source, environ))
    for variable, reference in secrets.items():
        env[variable] = _secret(variable, reference, environ)
    return env


def _variables(source: EnvSource, environ: Mapping[str, str]) -> dict[str, str]:
    match source.source:
        case "env":
            return {name: value for name, value in environ.items() if fnmatch.fnmatchcase(name, source.name)}
        case "file":
            return _parse(_read(Path(source.name), "the file of variables"), source.name)
        case "kubernetes":
            folder = MOUNTED_CONFIG / source.name
            if not folder.is_dir():
                raise _missing(f"config map {source.name}", f"it is not mounted at {folder}")
            names = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
            return {entry.name: _read(entry, "the config map") for entry in names}


def _secret(variable: str, reference: SecretRef, environ: Mapping[str, str]) -> str:
    match reference.source:
        case "env":
            if reference.name not in environ:
                raise _missing(f"secret {variable}", f"this node's agent has no variable {reference.name}")
            return environ[reference.name]
        case "file":
            return _read(Path(reference.name).expanduser(), f"secret {variable}").rstrip("\n")
        case "kubernetes":
            path = MOUNTED_SECRETS / reference.name / (reference.key or variable)
            return _read(path, f"secret {variable}")


def _parse(text: str, name: str) -> dict[str, str]:
    env = {}
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        variable, equals, value = stripped.removeprefix("export ").partition("=")
        if not equals or not variable.isidentifier():
            raise InputError("not of the form NAME=value", where=f"{name}:{number}")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        env[variable] = value
    return env


def _read(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_BYTES_MAX).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _missing(what, f"{path}: {getattr(error, 'strerror', None) or 'not text'}") from error


def _missing(what: str, why: str) -> InputError:
    return InputError(f"{what} cannot be read on this node", why=why)
