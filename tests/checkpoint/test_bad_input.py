"""Bad input of every kind: a clear error, the right exit code, and a target that is not touched."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from checkpoint.convert import hf_to_mm
from checkpoint.convert_cli import main
from mindspeed_mm.storage.shard import read_shard
from tests.checkpoint.samples import edit_json, layout_plan, rewrite_tensors, write_hf

HF_FILE = "model-00001-of-00002.safetensors"
SHARD = "model_optim_rng.pt"


@dataclass
class Scene:
    """What a case may spoil, and the command line that then runs."""

    root: Path
    hf: Path
    """A tied model in two files."""
    mm: Path
    """The same model as tp2 pp2."""
    command: str = "hf_to_mm"
    options: dict[str, object] = field(default_factory=dict)

    @property
    def target(self) -> Path:
        """What would be written."""
        return self.root / "out"

    @property
    def release(self) -> Path:
        """The shards."""
        return self.mm / "release"

    def shard(self, rank: str = "mp_rank_00_000") -> Path:
        """One shard file."""
        return self.release / rank / SHARD

    def edit_hf(self, change: Callable[[dict[str, Tensor]], None]) -> None:
        """Change tensors of the Hugging Face directory, which becomes one file."""

        def apply(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            change(tensors)
            return tensors

        self.hf = rewrite_tensors(self.hf, self.root / "changed", apply)

    def edit_shard(self, change: Callable[[dict[str, Tensor]], None], rank: str = "mp_rank_00_000") -> None:
        """Change the weights of one shard."""
        self.command = "mm_to_hf"
        content = read_shard(self.shard(rank), mmap=False)
        change(content["model"])
        torch.save(content, self.shard(rank))

    def argv(self) -> list[str]:
        """The command line."""
        options: dict[str, object] = {}
        if self.command == "hf_to_mm":
            options = {
                "mm_dir": self.target,
                "hf_config.hf_dir": self.hf,
                "parallel_config.llm_pp_layers": [1, 5],
                "parallel_config.vit_pp_layers": [4, 0],
                "parallel_config.tp_size": 2,
            }
        elif self.command == "mm_to_hf":
            options = {"mm_dir": self.mm, "save_hf_dir": self.target, "hf_config.hf_dir": self.hf}
        elif self.command == "resplit":
            options = {
                "source_dir": self.mm,
                "target_dir": self.target,
                "target_parallel_config.llm_pp_layers": [6],
                "target_parallel_config.vit_pp_layers": [4],
            }
        options |= self.options
        pairs = [(f"--cfg.{name}", str(value)) for name, value in options.items()]
        return ["Qwen2VLConverter", self.command, *(word for pair in pairs for word in pair)]


@pytest.fixture
def scene(hf_tied: Path, tmp_path: Path) -> Scene:
    shutil.copytree(hf_tied, tmp_path / "hf")
    hf_to_mm(hf_tied, tmp_path / "mm", layout_plan("tp2_pp2", hf_tied))
    return Scene(tmp_path, tmp_path / "hf", tmp_path / "mm")


CASES: list[tuple[str, int, str, Callable[[Scene], object]]] = []


def case(code: int, words: str) -> Callable[[Callable[[Scene], object]], Callable[[Scene], object]]:
    """Register a way to spoil a scene, with the exit code and words of the error that it must give."""

    def register(spoil: Callable[[Scene], object]) -> Callable[[Scene], object]:
        CASES.append((spoil.__name__, code, words, spoil))
        return spoil

    return register


# ---- Hugging Face sources ------------------------------------------------------------------------------------------


@case(13, "its header describes")
def a_truncated_weight_file(s: Scene) -> None:
    with (s.hf / HF_FILE).open("r+b") as file:
        file.truncate((s.hf / HF_FILE).stat().st_size - 1)


@case(13, "damaged or no safetensors file")
def an_empty_weight_file(s: Scene) -> None:
    (s.hf / HF_FILE).write_bytes(b"")


@case(13, "says that its header has")
def a_header_bomb(s: Scene) -> None:
    (s.hf / HF_FILE).write_bytes((1 << 62).to_bytes(8, "little") + b"{" * 1000)


@case(13, "is there twice")
def a_name_twice_in_one_header(s: Scene) -> None:
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f"{{{entry},{entry}}}".encode()
    (s.hf / HF_FILE).write_bytes(len(text).to_bytes(8, "little") + text + b"0000")


@case(13, "model.layers.3.mlp.up_proj.weight is missing")
def a_missing_tensor(s: Scene) -> None:
    s.edit_hf(lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))


@case(13, "model.layers.6.mlp.up_proj.weight has no place in the model")
def an_extra_tensor(s: Scene) -> None:
    s.edit_hf(lambda tensors: tensors.update({"model.layers.6.mlp.up_proj.weight": torch.zeros(2).bfloat16()}))


@case(13, "model.norm.weight has shape [65]; expected [64]")
def a_wrong_shape(s: Scene) -> None:
    s.edit_hf(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65).bfloat16()}))


@case(13, "has dtype int64; expected one of bfloat16")
def weights_that_are_no_floats(s: Scene) -> None:
    s.edit_hf(lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64).long()}))


@case(13, "k_proj.weight has dtype float32, but model.layers.0.self_attn.q_proj.weight has bfloat16")
def two_dtypes_in_one_tensor(s: Scene) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    s.edit_hf(lambda tensors: tensors.update({name: tensors[name].float()}))


@case(13, "the layers differ in dtype")
def two_dtypes_in_one_kind_of_layer(s: Scene) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    s.edit_hf(lambda tensors: tensors.update({name: tensors[name].half()}))


@case(15, "weights hold NaN or infinity: text_decoder.decoder.layers.2.mlp.linear_fc2.weight.")
def a_weight_that_is_nan(s: Scene) -> None:
    s.edit_hf(lambda tensors: tensors["model.layers.2.mlp.down_proj.weight"].view(-1)[5:6].fill_(torch.nan))


@case(15, "weights hold NaN or infinity")
def a_weight_that_is_infinite(s: Scene) -> None:
    s.edit_hf(lambda tensors: tensors["visual.blocks.1.attn.qkv.bias"].view(-1)[-1:].fill_(-torch.inf))


@case(13, "not plain *.safetensors names")
def an_index_that_points_outside(s: Scene) -> None:
    edit_json(s.hf / "model.safetensors.index.json", weight_map={"model.norm.weight": "../hf2/x.safetensors"})


@case(13, "lacks files that model.safetensors.index.json names")
def an_index_that_names_a_missing_file(s: Scene) -> None:
    (s.hf / HF_FILE).unlink()


@case(13, "and the files disagree")
def an_index_that_forgets_a_tensor(s: Scene) -> None:
    path = s.hf / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    del weight_map["model.norm.weight"]
    edit_json(path, weight_map=weight_map)


@case(13, "has no weight_map")
def an_index_without_a_map(s: Scene) -> None:
    edit_json(s.hf / "model.safetensors.index.json", weight_map=[])


@case(13, "but no model.safetensors.index.json")
def several_files_without_an_index(s: Scene) -> None:
    (s.hf / "model.safetensors.index.json").unlink()


@case(13, "holds tensors twice")
def two_generations_of_names_for_one_tensor(s: Scene) -> None:
    s.edit_hf(
        lambda tensors: tensors.update({"model.language_model.norm.weight": tensors["model.norm.weight"].clone()})
    )


@case(13, "copies of one tensor differ")
def a_tied_model_with_another_head(s: Scene) -> None:
    s.edit_hf(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))


@case(13, "lm_head.weight is missing")
def a_model_that_says_it_is_untied_without_a_head(s: Scene) -> None:
    edit_json(s.hf / "config.json", tie_word_embeddings=False)


@case(13, "No *.safetensors files found")
def a_directory_without_weights(s: Scene) -> None:
    for path in s.hf.glob("model*"):
        path.unlink()


@case(2, "No config.json in")
def a_directory_without_configuration(s: Scene) -> None:
    (s.hf / "config.json").unlink()


@case(2, 'model_type = "llama", expected "qwen2_vl"')
def the_configuration_of_another_model(s: Scene) -> None:
    edit_json(s.hf / "config.json", model_type="llama")


@case(2, "num_hidden_layers")
def a_configuration_that_names_a_key_twice(s: Scene) -> None:
    path = s.hf / "config.json"
    path.write_text(path.read_text().rstrip().rstrip("}") + ', "num_hidden_layers": 6}')


@case(2, "is not a directory")
def a_source_that_is_not_there(s: Scene) -> None:
    s.hf = s.root / "nowhere"


# ---- layouts -------------------------------------------------------------------------------------------------------


@case(2, "adds up to 7, but num_layers = 6")
def a_list_with_a_wrong_sum(s: Scene) -> None:
    s.options["parallel_config.llm_pp_layers"] = [2, 5]


@case(2, "vision is not finished where text starts")
def text_before_the_end_of_vision(s: Scene) -> None:
    s.options["parallel_config.vit_pp_layers"] = [3, 1]


@case(2, "both describe the same stages")
def lists_of_different_lengths(s: Scene) -> None:
    s.options["parallel_config.vit_pp_layers"] = [4]


@case(2, "inner lists of unequal length")
def a_nested_list_of_unequal_rows(s: Scene) -> None:
    s.options["parallel_config.llm_pp_layers"] = [[1, 2], [3]]


@case(2, "does not conform to restriction")
def a_negative_number_of_layers(s: Scene) -> None:
    s.options["parallel_config.llm_pp_layers"] = [7, -1]


@case(2, "must be divisible by TP size (3)")
def a_tensor_parallel_size_that_divides_nothing(s: Scene) -> None:
    s.options["parallel_config.tp_size"] = 3


@case(2, "Number of key-value heads (2) must be divisible by TP size (4) in the text tower")
def more_ranks_than_key_value_heads(s: Scene) -> None:
    s.options["parallel_config.tp_size"] = 4


@case(2, "both towers are split alike")
def another_split_for_the_vision_tower(s: Scene) -> None:
    s.options["parallel_config.vit_tp_size"] = 1


@case(2, "no experts")
def an_expert_parallel_size(s: Scene) -> None:
    s.options["parallel_config.ep_size"] = 2


@case(2, "llm_num_layers = 28, but config.json says 6")
def facts_about_another_model(s: Scene) -> None:
    s.options["common_model_config.llm_num_layers"] = 28


@case(2, "un-fused linears are not supported")
def a_structure_that_does_not_exist_here(s: Scene) -> None:
    s.options["common_model_config.enable_canonical_hf_struct"] = "true"


# ---- targets -------------------------------------------------------------------------------------------------------


@case(2, "is not empty")
def a_target_that_holds_something(s: Scene) -> None:
    s.target.mkdir()
    (s.target / "mine").write_text("precious")


@case(2, "is a symbolic link")
def a_target_that_is_a_link(s: Scene) -> None:
    (s.root / "elsewhere").mkdir()
    s.target.symlink_to(s.root / "elsewhere")


@case(2, "is a file")
def a_target_that_is_a_file(s: Scene) -> None:
    s.target.write_text("precious")


@case(11, "writable for every user")
def a_target_among_strangers(s: Scene) -> None:
    (s.root / "shared").mkdir()
    (s.root / "shared").chmod(0o777)
    s.options["mm_dir"] = s.root / "shared" / "out"


@case(11, "/proc/self")
def a_target_where_nothing_can_be_written(s: Scene) -> None:
    s.options["mm_dir"] = "/proc/self/out"


@case(2, "lies in or around")
def a_target_inside_the_source(s: Scene) -> None:
    s.options["mm_dir"] = s.hf / "mm"


# ---- MM sources ----------------------------------------------------------------------------------------------------


@case(13, "not a whole torch.save file")
def a_truncated_shard(s: Scene) -> None:
    s.command = "mm_to_hf"
    with s.shard("mp_rank_01_001").open("r+b") as file:
        file.truncate(s.shard("mp_rank_01_001").stat().st_size // 2)


@case(13, "not a whole torch.save file")
def a_shard_that_is_something_else(s: Scene) -> None:
    s.command = "mm_to_hf"
    s.shard().write_text("not a checkpoint")


@case(13, "is compressed")
def a_compressed_shard(s: Scene) -> None:
    s.command = "mm_to_hf"
    with zipfile.ZipFile(s.shard()) as archive:
        content = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(s.shard(), "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


@case(13, "mp_rank_01_001 is missing")
def a_missing_rank_directory(s: Scene) -> None:
    s.command = "mm_to_hf"
    shutil.rmtree(s.release / "mp_rank_01_001")


@case(13, "mp_rank_02_000 does not belong to the plan")
def an_extra_rank_directory(s: Scene) -> None:
    s.command = "mm_to_hf"
    shutil.copytree(s.release / "mp_rank_01_000", s.release / "mp_rank_02_000")


@case(13, "cannot be read: No such file")
def a_missing_shard_file(s: Scene) -> None:
    s.command = "mm_to_hf"
    s.shard().unlink()


def swap(s: Scene, one: str, other: str) -> None:
    for before, after in ((one, "x"), (other, one), ("x", other)):
        (s.release / before).rename(s.release / after)


@case(13, "mp_rank_01_000/model_optim_rng.pt has another content")
def swapped_tensor_ranks_when_hashes_are_checked(s: Scene) -> None:
    s.command = "mm_to_hf"
    s.options["check_hashes"] = "true"
    swap(s, "mp_rank_00_000", "mp_rank_01_000")


@case(13, "mp_rank_00_000: image_encoder.encoder.blocks.layers.0.input_layernorm.bias is missing")
def swapped_pipeline_ranks(s: Scene) -> None:
    s.command = "mm_to_hf"
    swap(s, "mp_rank_00_000", "mp_rank_00_001")


@case(13, "has another content than when it was written")
def a_flipped_bit_when_hashes_are_checked(s: Scene) -> None:
    s.command = "resplit"
    s.options["check_hashes"] = "true"
    data = bytearray(s.shard().read_bytes())
    data[len(data) // 2] ^= 4
    s.shard().write_bytes(data)


@case(13, "mp_rank_00_000: text_decoder.embedding.word_embeddings.weight is missing")
def a_shard_that_lacks_a_tensor(s: Scene) -> None:
    s.edit_shard(lambda model: model.pop("text_decoder.embedding.word_embeddings.weight"))


@case(13, "text_decoder.strange has no place on this stage")
def a_shard_with_an_extra_tensor(s: Scene) -> None:
    s.edit_shard(lambda model: model.update({"text_decoder.strange": torch.zeros(2)}))


@case(13, "has shape [3, 64]")
def a_shard_with_a_wrong_shape(s: Scene) -> None:
    s.edit_shard(
        lambda model: model.update({"text_decoder.embedding.word_embeddings.weight": torch.zeros(3, 64).bfloat16()})
    )


@case(13, "layers of one kind differ in shape")
def layers_of_different_shapes_without_a_configuration(s: Scene) -> None:
    name = "image_encoder.encoder.blocks.layers.2.mlp.linear_fc1.weight"
    for rank in ("mp_rank_00_000", "mp_rank_01_000"):
        s.edit_shard(lambda model: model.update({name: torch.zeros(5, 32).bfloat16()}), rank)
    s.command = "resplit"


@case(13, "has float32; they become one tensor")
def a_shard_with_another_dtype(s: Scene) -> None:
    name = "text_decoder.embedding.word_embeddings.weight"
    s.edit_shard(lambda model: model.update({name: model[name].float()}))


@case(13, "copies of one tensor differ")
def a_head_that_is_not_the_embedding_of_a_tied_model(s: Scene) -> None:
    s.edit_shard(lambda model: model["text_decoder.output_layer.weight"][3:4].add_(1), "mp_rank_01_001")


@case(15, "weights hold NaN or infinity")
def a_shard_with_nan(s: Scene) -> None:
    s.edit_shard(lambda model: model["text_decoder.decoder.layers.0.mlp.linear_fc1.weight"][0, :1].fill_(torch.nan))
    s.command = "resplit"


@case(13, "holds 1 virtual chunks; expected 2")
def shards_with_another_number_of_chunks(s: Scene) -> None:
    s.command = "mm_to_hf"
    (s.release / "stage_plan.json").unlink()
    s.options["parallel_config.llm_pp_layers"] = [[0, 1], [2, 3]]
    s.options["parallel_config.vit_pp_layers"] = [[4, 0], [0, 0]]
    s.options["parallel_config.tp_size"] = 2


@case(13, "cannot be used")
def a_damaged_plan(s: Scene) -> None:
    s.command = "mm_to_hf"
    (s.release / "stage_plan.json").write_text('{"format": 1}')


@case(2, "but the checkpoint was written with")
def lists_that_disagree_with_the_plan(s: Scene) -> None:
    s.command = "mm_to_hf"
    s.options["parallel_config.llm_pp_layers"] = [2, 4]


@case(2, "its layout must be said")
def neither_plan_nor_lists(s: Scene) -> None:
    s.command = "mm_to_hf"
    (s.release / "stage_plan.json").unlink()


@case(2, "text layers: the checkpoint has 6, the model 5")
def a_reference_of_another_depth(s: Scene) -> None:
    s.command = "mm_to_hf"
    edit_json(s.hf / "config.json", num_hidden_layers=5)


@case(13, "expected [641, 64]")
def a_reference_of_another_width(s: Scene) -> None:
    s.command = "mm_to_hf"
    edit_json(s.hf / "config.json", vocab_size=641 * 2)


@case(13, "does not list the tensors")
def a_reference_whose_index_lists_other_tensors(s: Scene) -> None:
    s.command = "mm_to_hf"
    path = s.hf / "model.safetensors.index.json"
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map={f"{name}2": file for name, file in weight_map.items()})


@case(13, "is no regular file")
def a_reference_with_a_pipe(s: Scene) -> None:
    s.command = "mm_to_hf"
    os.mkfifo(s.hf / "pipe")


@case(13, "holds no checkpoint")
def a_source_without_a_checkpoint(s: Scene) -> None:
    s.command = "mm_to_hf"
    shutil.rmtree(s.release)


@case(13, "has no iteration 40; there are: release")
def a_tracker_that_names_what_is_not_there(s: Scene) -> None:
    s.command = "mm_to_hf"
    (s.mm / "latest_checkpointed_iteration.txt").write_text("40")


@case(2, 'neither a number nor "release"')
def an_iteration_that_is_none(s: Scene) -> None:
    s.command = "mm_to_hf"
    s.options["iteration"] = "newest"


@case(2, "is no size")
def a_size_that_is_none(s: Scene) -> None:
    s.command = "mm_to_hf"
    s.options["max_shard_size"] = "huge"


@case(2, "llm_pp_layers is required")
def a_target_layout_that_is_not_said(s: Scene) -> None:
    s.command = "resplit"
    s.options["target_parallel_config.llm_pp_layers"] = "null"


def snapshot(root: Path) -> dict[str, bytes | str]:
    """Everything below a directory."""
    found: dict[str, bytes | str] = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path)] = path.read_bytes()
        else:
            found[str(path)] = ""
    return found


@pytest.mark.parametrize(("code", "words", "spoil"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_is_refused(
    code: int, words: str, spoil: Callable[[Scene], object], scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(scene)
    before = snapshot(scene.root)
    try:
        found = main(scene.argv())
    except SystemExit as stop:
        found = int(stop.code or 0)
    text = capsys.readouterr().err
    assert words in text
    assert found == code
    assert "Traceback" not in text
    assert snapshot(scene.root) == before


def test_there_are_many_kinds_of_bad_input() -> None:
    assert len(CASES) >= 60


def test_nan_is_converted_on_request(scene: Scene) -> None:
    a_weight_that_is_nan(scene)
    scene.options["allow_nan"] = "true"
    assert main(scene.argv()) == 0
    assert scene.target.is_dir()


def test_code_that_a_repository_brings_is_never_run(scene: Scene, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (scene.hf / "modeling.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_json(scene.hf / "config.json", auto_map={"AutoModel": "modeling.X"})
    scene.options["trust_remote_code"] = "true"
    assert main(scene.argv()) == 0
    assert not marker.exists()


def test_a_malicious_save_is_converted_without_running_it(scene: Scene, tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self) -> object:
            return os.system, (f"touch {marker}",)

    content = read_shard(scene.shard(), mmap=False)
    torch.save({**content, "args": Payload()}, scene.shard())
    for command in ("mm_to_hf", "resplit"):
        scene.command = command
        assert main(scene.argv()) == 0
        shutil.rmtree(scene.target)
    assert not marker.exists()


def test_a_model_of_another_width_does_not_fit_a_reference(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.hf = write_hf(tmp_path / "untied", tied=False)
    scene.command = "mm_to_hf"
    assert main(scene.argv()) == 2
    assert "tie_word_embeddings = False, but the checkpoint was written with True" in capsys.readouterr().err
