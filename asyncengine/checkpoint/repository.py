"""A model repository on the Hugging Face Hub.

Through huggingface_hub, which keeps the cache and honours HF_HOME, HF_ENDPOINT, HF_TOKEN and
HF_HUB_OFFLINE. It is imported on first use: a local model needs none of it.
"""

import glob
import io
import os
from collections.abc import Callable
from typing import Any

from ..errors import ModelLoadError

__all__ = ["OnProgress", "Repository"]

OnProgress = Callable[[int, int, str], None]


class Repository:
    """One repository on the Hub. Errors come out as `ModelLoadError` that says what to do."""

    def __init__(
        self,
        repository: str,
        revision: str | None,
        token: str | bool | None,
        download_dir: str | os.PathLike[str] | None,
        on_progress: OnProgress | None,
    ) -> None:
        self.repository = repository
        self.revision = revision
        self.token = token
        self.cache = None if download_dir is None else os.fspath(download_dir)
        self.progress = _progress_class(on_progress)

    def download(self, allow: list[str], ignore: list[str] | None, *, commit: str | None = None) -> str:
        """Downloads what is not in the cache; returns the folder, whose name is the commit."""
        from huggingface_hub import snapshot_download

        try:
            return snapshot_download(
                self.repository,
                revision=commit or self.revision,
                token=self.token,
                cache_dir=self.cache,
                allow_patterns=allow,
                ignore_patterns=ignore,
                library_name="asyncengine",
                tqdm_class=self.progress,
            )
        except Exception as error:
            raise self.explain(error) from error

    def files(self, directory: str, commit: str) -> list[str]:
        """Names of all files at a commit; where the Hub cannot be asked, of those in the cache."""
        from huggingface_hub import HfApi

        try:
            return HfApi(token=self.token).list_repo_files(self.repository, revision=commit)
        except Exception as error:
            found = glob.glob("**/*", root_dir=directory, recursive=True)
            if not any(name.endswith(".gguf") for name in found):
                raise self.explain(error) from error
            return found

    def explain(self, error: Exception) -> ModelLoadError:
        from huggingface_hub import constants, errors

        model = f"{self.repository!r}"
        if isinstance(error, errors.HFValidationError):
            return ModelLoadError(
                f"{model} is neither an existing path nor a Hugging Face Hub id such as 'Qwen/Qwen3-0.6B'"
            )
        if isinstance(error, errors.GatedRepoError):
            return ModelLoadError(
                f"{model} is gated: accept its terms at {constants.ENDPOINT}/{self.repository}, "
                f"then pass hf_token= or set HF_TOKEN"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return ModelLoadError(
                f"{model} is neither an existing path nor a model on {constants.ENDPOINT}; "
                f"check the spelling, and if it is private pass hf_token= or set HF_TOKEN"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelLoadError(f"{model} has no revision {self.revision!r} on {constants.ENDPOINT}")
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 401:
            return ModelLoadError(
                f"{constants.ENDPOINT} does not accept the token; pass another hf_token= or unset HF_TOKEN"
            )
        if isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
            at = "" if self.revision is None else f" at revision {self.revision!r}"
            if constants.HF_HUB_OFFLINE:
                return ModelLoadError(
                    f"{model}{at} is not, or not wholly, in the cache, and HF_HUB_OFFLINE is set; "
                    f"unset it to download the model, or pass a local path"
                )
            return ModelLoadError(
                f"{constants.ENDPOINT} cannot be reached, and {model}{at} is not wholly in the cache; "
                f"check the network, or pass a local path ({_cause(error)})"
            )
        return ModelLoadError(f"downloading {model} from {constants.ENDPOINT} failed: {_cause(error)}")


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _progress_class(on_progress: OnProgress | None) -> Any:
    """A tqdm class that shows nothing and reports bytes, or files where huggingface_hub counts no bytes."""
    from tqdm import tqdm

    class Reporter(tqdm):  # type: ignore[misc]
        monitor_interval = 0
        newest: "Reporter | None" = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": io.StringIO()})
            if self.unit == "B" or Reporter.newest is None or Reporter.newest.unit != "B":
                Reporter.newest = self

        def display(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def update(self, n: float | None = 1) -> bool | None:
            changed: bool | None = super().update(n)
            if on_progress is not None and self is Reporter.newest and self.total:
                unit = "bytes" if self.unit == "B" else "files"
                on_progress(min(int(self.n), int(self.total)), int(self.total), unit)
            return changed

    return Reporter
