"""Direction files: what is written is read back, plans take them, other tools' formats go in and out; the atom
report."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from direction_cases import contrast_of, plain_sae, random_sides
from launch.cli.main import main
from moe_steer import directions
from moe_steer.directions import (
    Direction,
    caa,
    export_easyedit,
    export_gguf,
    import_easyedit,
    import_gguf,
    report_atoms,
    single_atom,
    sta,
)
from moe_steer.plan import ResidualVector, SteeringPlan


def some_direction(layer: int = 3, width: int = 8) -> Direction:
    vector_D = torch.randn(width, generator=torch.Generator().manual_seed(layer))
    return Direction(vector_D=vector_D, layer=layer, method="caa", header={"residual_norm": 2.5})


def test_public_names_are_all_there_and_no_module_hides_a_function() -> None:
    from moe_steer.directions import atoms, methods, target_atoms

    assert all(callable(getattr(directions, name)) for name in directions.__all__)
    modules = (atoms, methods, target_atoms)
    assert not {module.__name__.rpartition(".")[2] for module in modules} & set(directions.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = directions.nothing


def test_a_direction_is_read_back_whole(tmp_path: Path) -> None:
    sae = plain_sae(12)
    direction = sta(contrast_of(*random_sides(3, 12, 4), sae), sae, keep=0.3)
    direction.save(tmp_path / "new" / "d.safetensors")
    again = Direction.load(tmp_path / "new" / "d.safetensors")
    assert torch.equal(again.vector_D, direction.vector_D)
    assert again.vector_D.dtype == torch.float32
    assert (again.layer, again.site, again.method) == (3, "residual", "sta")
    assert dict(again.header) == json.loads(json.dumps(direction.header))
    assert again.header["sae"]["sha256"] == "0"
    assert again.header["residual_norm"] > 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["d.safetensors"]


def test_equal_directions_are_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        some_direction().save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_plan_takes_the_file(tmp_path: Path) -> None:
    direction = some_direction()
    direction.save(tmp_path / "d.safetensors")
    entry = ResidualVector(3, "d.safetensors")
    assert torch.equal(
        SteeringPlan(residual=[entry], base_dir=str(tmp_path)).vector(entry).vector_D, direction.vector_D
    )


def test_the_header_lists_the_heaviest_atoms_first(tmp_path: Path) -> None:
    sae = plain_sae(12)
    atoms = sta(contrast_of(*random_sides(3, 12, 4), sae), sae, num_atoms=4).header["atoms"]
    sizes = [abs(weight) for _, weight in atoms]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 4


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"vector": torch.ones(3)}, None, r"holds \['vector'\] and no direction: give a file of 'moe-steer direction'"),
        ({"other": torch.ones(3)}, {"direction": "{}"}, r"holds \['other'\] and no direction"),
        ({"vector": torch.ones(3)}, {"direction": '{"version": 2}'}, "its version is 2, this program reads version 1"),
        ({"vector": torch.ones(3)}, {"direction": '{"version": 1}'}, "cannot be used: it lacks 'layer'"),
        ({"vector": torch.ones(3)}, {"direction": "{"}, "has a header that is not JSON .*: make the direction again"),
        (
            {"vector": torch.ones(2, 2)},
            {"direction": '{"version": 1, "layer": 1, "site": "residual", "method": "x"}'},
            "shape",
        ),
    ],
)
def test_other_files_are_refused(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "d.safetensors"
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        Direction.load(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        Direction.load(path)
    with pytest.raises(ValueError, match="there is no direction file"):
        Direction.load(tmp_path / "none")


def test_what_is_no_direction_is_refused() -> None:
    with pytest.raises(ValueError, match="for layer 3: give one finite vector"):
        Direction(vector_D=torch.tensor([1.0, float("nan")]), layer=3, method="caa")
    with pytest.raises(ValueError, match="layer of a direction is -1: give a whole number >= 0"):
        Direction(vector_D=torch.ones(2), layer=-1, method="caa")
    with pytest.raises(ValueError, match="the header of a direction may not hold 'layer'"):
        Direction(vector_D=torch.ones(2), layer=1, method="caa", header={"layer": 2})


def test_easyedit_vectors_go_in_and_out(tmp_path: Path) -> None:
    """The format is what its code writes: torch.save of one bare tensor [D], the layer in the file's name."""
    vector_D = torch.randn(8)
    torch.save(vector_D, tmp_path / "layer_20_act_and_freq_trim0.65.pt")
    direction = import_easyedit(tmp_path / "layer_20_act_and_freq_trim0.65.pt")
    assert (direction.layer, direction.method) == (20, "imported")
    assert torch.equal(direction.vector_D, vector_D)
    assert direction.header["imported_from"]["format"] == "easyedit"
    path = export_easyedit(direction, tmp_path / "out")
    assert path.name == "layer_20.pt"
    assert torch.equal(torch.load(path, weights_only=True), vector_D)
    with pytest.raises(ValueError, match="layer_20.pt' exists: give another folder, or remove it first"):
        export_easyedit(direction, tmp_path / "out")


def test_half_precision_easyedit_vectors_are_widened(tmp_path: Path) -> None:
    torch.save(torch.ones(4, dtype=torch.bfloat16), tmp_path / "v.pt")
    assert import_easyedit(tmp_path / "v.pt", layer=2).vector_D.dtype == torch.float32
    with pytest.raises(ValueError, match=r"does not say the layer \(layer_20.pt\): give it"):
        import_easyedit(tmp_path / "v.pt")


def test_a_pickle_with_code_is_not_opened(tmp_path: Path) -> None:
    torch.save(Path, tmp_path / "layer_1.pt")
    with pytest.raises(
        ValueError, match="no file of plain tensors, and other pickles are not opened: download it"
    ) as error:
        import_easyedit(tmp_path / "layer_1.pt")
    assert "weights_only" not in str(error.value), "torch's own words advise to run it"
    torch.save({"layer_1": torch.ones(3)}, tmp_path / "layer_2.pt")
    with pytest.raises(ValueError, match=r"holds a dict: a vector of EasyEdit is one tensor \[D\]"):
        import_easyedit(tmp_path / "layer_2.pt")
    torch.save(torch.ones(2, 2), tmp_path / "layer_3.pt")
    with pytest.raises(ValueError, match=r"holds a tensor of shape \(2, 2\)"):
        import_easyedit(tmp_path / "layer_3.pt")
    with pytest.raises(ValueError, match="there is no file"):
        import_easyedit(tmp_path / "layer_4.pt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"method": "../../x"},
            "method of a direction is '../../x': give a name of 1 to 60 characters, a letter first and no slash",
        ),
        ({"method": "/tmp/x"}, "method of a direction is '/tmp/x'"),
        ({"method": None}, "method of a direction is None"),
        ({"method": ""}, "method of a direction is ''"),
        ({"method": "a\\x"}, "method of a direction is"),
        ({"method": "a\nb"}, "method of a direction is"),
        ({"method": "m" * 61}, "method of a direction is 'mmm"),
        ({"site": None}, "site of a direction is None: give the name of a place, such as residual"),
        ({"model": "x"}, "'model' is 'x': give an object or null"),
        ({"norm": True}, "'norm' is True: give a number or null"),
        ({"terms": [1]}, "'terms' is .1.: give a list, each item an object or null"),
    ],
)
def test_a_header_of_somebody_elses_file_is_checked(change: dict[str, object], said: str, tmp_path: Path) -> None:
    """The method names the file that a conversion writes: it must not say where that goes. Other words are its author's own."""
    assert Direction(vector_D=torch.ones(2), layer=1, method="sta: CAA (mean, k=3)").method == "sta: CAA (mean, k=3)"
    header = {"version": 1, "layer": 3, "site": "residual", "method": "caa", **change}
    path = tmp_path / "in" / "d.safetensors"
    path.parent.mkdir()
    save_file({"vector": torch.ones(4)}, path, {"direction": json.dumps(header)})
    with pytest.raises(ValueError, match=f"d.safetensors cannot be used: .*{said}") as caught:
        Direction.load(path)
    assert "\n" not in str(caught.value)


def test_other_tools_add_to_the_output_of_a_layer_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Direction(vector_D=V, layer=2, method="caa", site="mlp").save("d.safetensors")
    for kind in ("easyedit", "gguf"):
        assert main(["convert-direction", "d.safetensors", "--to", kind, "--out", "out"]) == 1
        assert "d.safetensors is of site 'mlp', and other tools add to the output of" in capsys.readouterr().err
    assert not Path("out").exists()
    with pytest.raises(ValueError, match="of site 'mlp', and EasyEdit adds to the output of a block"):
        export_easyedit(Direction.load("d.safetensors"), "out")
    assert main(["convert-direction", "d.safetensors", "--out", "out"]) == 0


V = torch.arange(4.0) - 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (
            V.to(torch.complex64),
            r"holds a tensor of shape \(4,\), torch.complex64, torch.strided: a vector of EasyEdit is",
        ),
        (V.long(), "torch.int64"),
        (V > 0, "torch.bool"),
        (V.to_sparse(), "torch.sparse_coo: a vector of EasyEdit is one tensor"),
        (V.double() * 1e300, "holds numbers that are not finite: make it again"),
        (V * float("nan"), "holds numbers that are not finite: make it again"),
        (V.double() * 1e-300, "holds a vector of zeros, which has no direction: make it again"),
        (V * 0, "holds a vector of zeros"),
        (V[:0], "holds a vector of zeros"),
    ],
)
def test_a_tensor_that_is_no_direction_is_refused_by_its_file(value: torch.Tensor, said: str, tmp_path: Path) -> None:
    """Of complex numbers half would be left out, and zeros would be refused only where a plan adds them."""
    torch.save(value, tmp_path / "layer_2.pt")
    with pytest.raises(ValueError, match=f"layer_2.pt .*{said}|layer_2.pt {said}") as caught:
        import_easyedit(tmp_path / "layer_2.pt")
    assert "\n" not in str(caught.value)


def test_vectors_of_other_widths_and_owners_are_read(tmp_path: Path) -> None:
    for value in (V.double(), V.half(), torch.nn.Parameter(V), torch.stack([V, V])[0], torch.arange(9.0)[::2]):
        torch.save(value, tmp_path / "layer_2.pt")
        assert torch.equal(import_easyedit(tmp_path / "layer_2.pt").vector_D, value.detach().float())


def test_control_vectors_go_in_and_out(tmp_path: Path) -> None:
    files = []
    for layer in (2, 5):
        files.append(tmp_path / f"{layer}.safetensors")
        some_direction(layer).save(files[-1])
    assert export_gguf(files, tmp_path / "cv.gguf")["layers"] == [2, 5]
    first, second = import_gguf(tmp_path / "cv.gguf")
    assert (first.layer, second.layer) == (2, 5), "the zeros in between are no directions"
    assert torch.equal(first.vector_D, some_direction(2).vector_D)
    assert second.header["imported_from"]["format"] == "gguf"


def test_a_control_vector_as_repeng_writes_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "cv.gguf"), "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 1)
    writer.add_tensor("direction.7", torch.arange(4.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (direction,) = import_gguf(tmp_path / "cv.gguf")
    assert direction.layer == 7
    assert direction.vector_D.tolist() == [0, 1, 2, 3]
    assert direction.header["imported_from"]["model_hint"] == "mistral"


def test_other_gguf_files_and_mixed_models_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="is a GGUF file of 'llama': a control vector is needed"):
        import_gguf(tmp_path / "model.gguf")
    files = []
    for name in ("qwen2", "llama"):
        files.append(tmp_path / name)
        Direction(vector_D=torch.ones(4), layer=2, method="caa", header={"model": {"model_type": name}}).save(files[-1])
    with pytest.raises(ValueError, match="the directions belong to llama, qwen2: a control vector is for one model"):
        export_gguf(files, tmp_path / "cv.gguf")


def test_the_report_names_the_atoms_and_what_they_do() -> None:
    sae = plain_sae(3)
    positive = [torch.tensor([[4.0, 1.0, 0.0], [2.0, 0.0, 0.0]]).double()]
    negative = [torch.tensor([[0.0, 0.0, 2.0]]).double()]
    contrast = contrast_of(positive, negative, sae)
    report = report_atoms(sta(contrast, sae, num_atoms=2), contrast, sae, labels={0: "ends"})
    assert report.startswith("# sta, layer 3\n\n2 of 3 atoms of made with seed 0; norm ")
    rows = [line for line in report.splitlines() if line.startswith("| 0") or line.startswith("| 2")]
    assert rows[0].startswith("| 0 | 3 | 3 | 0 | - | 100.0% | 0.0% | 100.0% | 0.0% |")
    assert rows[0].endswith("| ends |")
    assert rows[1].startswith("| 2 | -2 | 0 | 2 | - | 0.0% | 100.0% | 0.0% | 100.0% |")
    assert "1 of the listed atoms fire at more than half of the tokens" in report
    short = report_atoms(sta(contrast, sae, num_atoms=2), contrast, sae, top=1)
    assert "1 of 2 atoms are shown." in short
    assert len({line.count("|") for line in report.splitlines() if line.startswith("|")}) == 1
    assert report_atoms(single_atom(contrast, sae), contrast, sae).startswith("# single_atom, layer 3")
    with pytest.raises(ValueError, match="the direction of method 'caa' has no atoms"):
        report_atoms(caa(contrast), contrast, sae)
