"""Collect what is sent with a job: the current folder and the code that runs it, without data, caches, results and secrets.

Equal files give equal archives, so that a cluster that has one does not receive it again.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath

import pipeline
from pipeline.config import presets
from pipeline.console import size
from pipeline.errors import UsageError
from pipeline.redaction import KNOWN_SHAPES

# names of files and folders that are never sent, in any folder; lower case, matched without regard to case
VERSION_CONTROL = (".git", ".hg", ".svn", ".jj")
CACHES = (
    "__pycache__",
    "*.pyc",
    ".*_cache",
    ".cache",
    ".hypothesis",
    ".ipynb_checkpoints",
    ".tox",
    ".nox",
    "node_modules",
    "*.egg-info",
)
ENVIRONMENTS = (".venv", "venv", "virtualenv", ".conda")
RESULTS = ("mlruns", "mlartifacts", "mlflow.db*", "*.log")
ARCHIVES = ("*.zip", "*.tar", "*.gz", "*.tgz", "*.bz2", "*.xz", "*.zst")
ARRAYS = ("*.parquet", "*.arrow", "*.npz", "*.npy", "*.h5", "*.hdf5", "*.tfrecord", "*.bin", "*.pkl", "*.pickle")
WEIGHTS = ("*.pt", "*.pth", "*.ckpt", "*.safetensors", "*.onnx")
PICTURES = ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.bmp", "*.tif", "*.tiff", "*.mp4", "*.avi", "*.mov")
SECRETS = (
    *(".env", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".pgpass", ".npmrc", ".pypirc", ".git-credentials"),
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.gpg", "*.asc", ".htpasswd"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "auth_token*", "kubeconfig*", "*.tfstate*", "*.tfvars"),
    *(".ssh", ".aws", ".azure", ".gcloud", ".kube", ".gnupg", ".docker", ".ray"),
    *("credentials", "*credentials*.json", "*credentials*.y*ml", "*credentials*.csv", "service[-_]account*.json"),
    *(
        "*secret*.json",
        "*secret*.y*ml",
        "*secret*.txt",
        "*secret*.toml",
        "*secret*.ini",
        "*token*.txt",
        "*password*.txt",
    ),
)
NEVER = (*VERSION_CONTROL, *CACHES, *ENVIRONMENTS, *RESULTS, *ARCHIVES, *ARRAYS, *WEIGHTS, *PICTURES, *SECRETS)
NEVER_OF_OURS = tuple(pattern for pattern in NEVER if pattern not in WEIGHTS)  # our classifiers are part of the package
# folders that we create, excluded at the top of the folder only
OURS = ("runs", "sweeps", "datasets", "ddpm", "pipeline", "dist", "build")
MAX_FILES = 20_000
GIT_S = 30.0
SCANNED_BYTES = 1 << 20  # larger files are not searched for tokens
FOREIGN = ".ddpm-pipe"  # folder of the archive for files from outside the folder


@dataclass
class Package:
    """Files by name in the archive; `left_out` are files that contain a secret."""

    files: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Size of all files before compression."""
        return sum(path.stat().st_size for path in self.files.values())

    def require_size(self, max_mb: float) -> None:
        """Raise UsageError if the files exceed the profile's limit; names the largest."""
        total = self.num_bytes
        if total <= max_mb * 1e6:
            return
        largest = sorted(self.files, key=lambda name: self.files[name].stat().st_size, reverse=True)[:3]
        shown = ", ".join(f"{name} {size(self.files[name].stat().st_size)}" for name in largest)
        raise UsageError(
            f"{size(total)} would be sent with the job, more than runtime_env.max_mb {max_mb:g} (largest: {shown}); "
            "name what is not needed in runtime_env.excludes, or type the command in a smaller folder"
        )

    def with_code(self, code: Package, named: Collection[str]) -> Package:
        """Return these files and the code that runs. Its modules replace files with their names, except `named` files."""
        modules = {PurePosixPath(name).parts[0] for name in code.files}
        kept = {
            name: path
            for name, path in self.files.items()
            if name in named or PurePosixPath(name).parts[0] not in modules
        }
        return Package(kept | code.files, [*self.left_out, *code.left_out])

    def archive(self) -> bytes:
        """Return a zip archive whose bytes depend only on names and contents."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(self.files):
                about = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                about.compress_type = zipfile.ZIP_DEFLATED
                about.external_attr = (0o755 if os.access(self.files[name], os.X_OK) else 0o644) << 16
                archive.writestr(about, self.files[name].read_bytes())
        return buffer.getvalue()


def working_folder(
    folder: Path, excludes: Sequence[str], named: Iterable[Path] = (), *, whole: bool = True
) -> tuple[Package, dict[Path, str]]:
    """Return the files of a folder to send, and the names in the archive of files that the command names.

    Of a git checkout, files that git does not ignore are sent. Named files are always sent; without `whole`, only they are.
    """
    package = Package()
    names: dict[Path, str] = {}
    for name in sorted(_listed(folder)) if whole else ():
        if not _is_ours(name) and not _is_excluded(name, excludes):
            _add(package, name, folder / name, folder)
    for number, path in enumerate(named):
        there, root = path.resolve(), folder.resolve()
        inside = there.is_relative_to(root)
        names[path] = there.relative_to(root).as_posix() if inside else f"{FOREIGN}/{number}/{there.name}"
        package.files[names[path]] = there
    return package, names


def code(modules: Sequence[str] = (), excludes: Sequence[str] = ()) -> Package:
    """Return the code that runs: this package with presets and profiles, the core, and modules by name or path.

    The same files are excluded as in a folder. UsageError if nothing of a module would be sent.
    """
    root = Path(pipeline.__file__).resolve().parent
    package = Package()
    for top in (root, _folder_of("ddpm")):
        _add_tree(package, top, top.name, (), NEVER_OF_OURS)
    for kind in ("experiments", "cluster"):  # the place in an installed package
        _add_tree(package, presets.folder_of(kind), f"pipeline/shipped/{kind}", (), NEVER_OF_OURS)
    for module in modules:
        path = Path(module).expanduser() if os.sep in module or module.endswith(".py") else _folder_of(module)
        sent = Package()
        if path.is_dir():
            _add_tree(sent, path.resolve(), path.resolve().name, excludes, NEVER)
        elif path.is_file():
            _add(sent, path.name, path.resolve(), path.resolve().parent)
        else:
            raise UsageError(
                f"runtime_env.py_modules: {module!r} is neither a module that can be imported here nor a path"
            )
        if not sent.files:
            raise UsageError(
                f"runtime_env.py_modules: nothing of {module!r} in {path} would be sent: it has only links to other places, files "
                "with secrets, or kinds of files that are never sent"
            )
        package.files |= sent.files
        package.left_out += sent.left_out
    return package


def own_module(module: str, folder: Path, sent: Package) -> str | None:
    """Return the path of a network's module or package if it exists here and is not sent with the folder.

    It may be installed, on PYTHONPATH, or ignored by git. The folder is searched last, as when the network is built.
    """
    top = module.partition(".")[0]
    try:
        found = PathFinder.find_spec(top, [*sys.path, str(folder)]) or importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if found is None or not found.has_location:
        return None
    origin = Path(str(found.origin)).resolve()
    place = origin.parent if origin.name == "__init__.py" else origin
    name = origin.relative_to(place.parent).as_posix()  # the only name under which the job finds it in the folder
    travels = name in sent.files and sent.files[name].resolve() == origin
    return None if travels else str(place)


def _folder_of(module: str) -> Path:
    """Return the folder or file of an importable top-level module; UsageError if there is none."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.origin:
        raise UsageError(f"runtime_env.py_modules: no module {module!r} can be imported here; give its name or path")
    origin = Path(found.origin)
    return origin.parent if origin.name == "__init__.py" else origin


def _add_tree(package: Package, top: Path, name: str, excludes: Sequence[str], never: Sequence[str]) -> None:
    for path in sorted(top.rglob("*")):
        inner = path.relative_to(top).as_posix()
        if not _is_excluded(inner, excludes, never):
            _add(package, f"{name}/{inner}", path, top)


def _add(package: Package, name: str, path: Path, folder: Path) -> None:
    """Add a file of a folder, unless it contains a secret."""
    if not _is_plain(path, folder):
        return
    if _holds_secret(path):
        package.left_out.append(name)
    else:
        package.files[name] = path


def _listed(folder: Path) -> Iterator[str]:
    """Yield the names of the files below a folder, from git in a checkout; UsageError if there are too many."""
    for count, name in enumerate(_names(folder)):
        if count == MAX_FILES:
            raise UsageError(
                f"{folder} holds more than {MAX_FILES} files, too many to send with a job; type the command in the folder of your "
                "code, or set runtime_env: {working_dir: false}"
            )
        yield name


def _names(folder: Path) -> Iterator[str]:
    names = _by_git(folder)
    for name in _by_walking(folder) if names is None else names:
        inner = folder / name
        if names is not None and (inner / ".git").exists() and not inner.is_symlink():
            # a submodule or another checkout, of which git lists only the name
            yield from (f"{name.rstrip('/')}/{each}" for each in _names(inner))
        else:
            yield name


def _by_git(folder: Path) -> list[str] | None:
    """Return the files that git does not ignore below a folder; None without a checkout, or if the checkout ignores the whole folder.

    UsageError if git fails in a checkout: ignored files may be secrets.
    """
    done = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if done is None:
        return None
    names = [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]
    if not names:
        ignored = _git(folder, "check-ignore", "-q", ".")
        return None if ignored is not None and ignored.returncode == 0 else []
    return names


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[bytes] | None:
    """Run git, which exits with 0 or 1; None if it fails outside a checkout, UsageError if it fails in one."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, timeout=GIT_S)
        if done.returncode in (0, 1):
            return done
        why = " ".join(done.stderr.decode(errors="replace").split())[:400]
    except subprocess.TimeoutExpired:
        why = f"no answer within {GIT_S:g} s"
    except OSError as error:
        why = str(error)
    there = folder.resolve()
    if not any(os.path.lexists(place / ".git") for place in (there, *there.parents)):
        return None
    raise UsageError(
        f"{folder} is in a git checkout, and git cannot list its ignored files ({why}); make `git status` work there, type the "
        "command elsewhere, or set runtime_env: {working_dir: false}"
    )


def _by_walking(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder):
        place = Path(parent).relative_to(folder)
        inner = {name: (place / name).as_posix() for name in sorted(folders)}
        folders[:] = [name for name, path in inner.items() if not _is_ours(path) and not _is_excluded(path, ())]
        yield from ((place / name).as_posix() for name in files)


def _is_ours(name: str) -> bool:
    return PurePosixPath(name).parts[0] in OURS


def _is_excluded(name: str, excludes: Sequence[str], never: Sequence[str] = NEVER) -> bool:
    parts = PurePosixPath(name).parts
    return (
        any(fnmatch.fnmatch(part.lower(), pattern) for part in parts for pattern in never)
        or any(fnmatch.fnmatch(part, pattern) for part in parts for pattern in excludes)
        or any(fnmatch.fnmatch(name, pattern) for pattern in excludes)
        or any(fnmatch.fnmatch(name, f"{pattern.rstrip('/')}/*") for pattern in excludes)
    )


def _is_plain(path: Path, folder: Path) -> bool:
    """Whether a path is a file inside the folder, also after following links."""
    return path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _holds_secret(path: Path) -> bool:
    if path.stat().st_size > SCANNED_BYTES:
        return False
    return KNOWN_SHAPES.search(path.read_bytes().decode(errors="ignore")) is not None
