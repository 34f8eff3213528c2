"""Files of ``torch.save``, opened without running any code in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def load_plain(path: str | os.PathLike[str]) -> Any:
    """What a file of tensors and plain containers holds, on the CPU. ValueError, in one line, for any other pickle: torch's own
    words are left out, which advise to run the code in it."""
    name = os.fspath(path)
    try:
        return torch.load(Path(path), map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the unpickler's own errors have no common kind
        raise ValueError(
            f"{name} is damaged, or no file of plain tensors, and other pickles are not opened: download it again, or convert it"
        ) from error
