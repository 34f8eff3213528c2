"""``moe-steer convert-direction``: directions from and to the formats of other tools."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from launch.core.option_checks import check_folder

if TYPE_CHECKING:
    from moe_steer import Direction


@dataclass(frozen=True, kw_only=True)
class ConvertDirection:
    """Read directions of other tools, or write them: EasyEdit's .pt, GGUF control vectors."""

    files: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Files of ours (.safetensors), of EasyEdit (.pt) or GGUF control vectors (.gguf)."""
    out: str
    """Folder to write to; with --to gguf, the file."""
    to: Literal["safetensors", "easyedit", "gguf"] = "safetensors"
    """Format to write."""
    layer: int | None = None
    """Decoder layer of .pt files whose name does not say it."""

    def run(self) -> int:
        """Write, and say what was written."""

        from moe_steer.directions import export_easyedit, export_gguf

        if not self.files:
            raise ValueError("there is nothing to convert: give files (.safetensors, .pt or .gguf)")
        if self.to != "gguf":
            check_folder(self.out)
        directions = []
        for name in self.files:
            directions += self._read(name)
            if self.to != "safetensors" and directions[-1].site != "residual":
                raise ValueError(
                    f"{name} is of site {directions[-1].site!r}, and other tools add to the output of a layer: leave it out"
                )
        if self.to == "gguf":
            with TemporaryDirectory() as folder:
                files = [str(Path(folder, f"{number}.safetensors")) for number in range(len(directions))]
                for file, direction in zip(files, directions, strict=True):
                    direction.save(file)
                written = export_gguf(files, self.out)
            layers = [direction.layer for direction in directions]
            sums = sorted({layer for layer in layers if layers.count(layer) > 1})
            added = "".join(f", layer {layer} the sum of {layers.count(layer)} files" for layer in sums)
            print(f"wrote {self.out}: layers {', '.join(map(str, written['layers']))}{added}; use: {written['use']}")
            return 0
        stems = {"easyedit": "layer_{0.layer}", "safetensors": "{0.method}-L{0.layer}"}
        names = [stems[self.to].format(direction) for direction in directions]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two of the files would both become {twice[0]}: convert them into different folders")
        for name, direction in zip(names, directions, strict=True):
            path = Path(self.out, f"{name}.safetensors")
            if self.to == "easyedit":
                path = export_easyedit(direction, self.out)
            else:
                direction.save(path)
            print(f"wrote {path}: layer {direction.layer}, norm {direction.norm:.4g}")
        return 0

    def _read(self, name: str) -> list[Direction]:

        from moe_steer import Direction
        from moe_steer.directions import import_easyedit, import_gguf

        kind = Path(name).suffix
        if self.layer is not None and kind != ".pt":
            raise ValueError(f"--layer is for .pt files, and {name!r} says its layer itself: leave it out")
        stated = re.search(r"layer_(\d+)", Path(name).name)
        if self.layer is not None and stated and int(stated[1]) != self.layer:
            raise ValueError(f"--layer is {self.layer} and the name of {name!r} says {stated[1]}: leave --layer out")
        if kind == ".pt" and self.layer is None and stated is None and Path(name).is_file():
            raise ValueError(f"the name of {name!r} does not say its layer as layer_20.pt does: give --layer")
        if kind == ".pt":
            return [import_easyedit(name, self.layer)]
        if kind == ".gguf":
            return import_gguf(name)
        if kind == ".safetensors":
            return [Direction.load(name)]
        raise ValueError(f"{name!r} is neither .safetensors nor .pt nor .gguf: give files of these kinds")
