"""Private names of torch, transformers and PEFT exist with the signature we rely on, and each switch has its effect.

A new version of one of them is to fail here, loudly, and not silently in training.
"""

import inspect

import pytest

torch = pytest.importorskip("torch")
from packaging.version import Version  # noqa: E402
from torch import nn  # noqa: E402

from surgvqa.model import peft_internals, torch_internals, transformers_internals  # noqa: E402

pytestmark = pytest.mark.model


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


# --- torch ------------------------------------------------------------------------------------------------------------


def test_inductors_graph_pass_is_called_as_we_define_it():
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    assert parameters(CustomGraphPass.__call__) == ["self", "graph"]
    assert parameters(CustomGraphPass.uuid) == ["self"]
    assert parameters(get_hash_for_files)[0] == "paths"
    assert CustomGraphPass.__abstractmethods__ == {"__call__", "uuid"}
    assert torch_internals.KeepSeeds().uuid() == torch_internals.KeepSeeds().uuid() != b""


@pytest.mark.parametrize(
    "module, names",
    [
        ("torch._dynamo.config", ["suppress_errors", "allow_unspec_int_on_nn_module", "recompile_limit"]),
        ("torch._functorch.config", ["aggressive_recomputation"]),
        ("torch._inductor.config", ["joint_custom_post_pass"]),
    ],
)
def test_compiler_settings_exist(module, names):
    import importlib

    config = importlib.import_module(module)
    with config.patch({name: getattr(config, name) for name in names}):  # raises for a name that is no setting
        pass


def test_the_compilers_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    assert torch_internals.compiler_cache_dir() == tmp_path / "compiled"


def test_fsdp2_is_reset_by_names_that_exist():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    from surgvqa.model.divide import DividedLayers

    assert parameters(FSDPModule._get_fsdp_state) == ["self"]
    assert parameters(FSDPState._lazy_init) == parameters(FSDPState._root_post_backward_final_callback) == ["self"]
    state = FSDPState()
    assert state._comm_ctx is not None and state._state_ctx.iter_forward_root is None
    for name in ("allocate", "__call__"):  # what FSDP2 gathers with
        assert parameters(getattr(DividedLayers, name)) == parameters(getattr(AllGather, name))


def test_the_compilers_keys_do_not_depend_on_the_order_of_imports(monkeypatch):
    """The hash that is part of a key, with a module that has an attribute `torch` before all others."""
    import copyreg
    import pickle
    import sys
    import types

    from torch._inductor.codecache import FxGraphCachePickler

    def first_module(name):
        module = types.ModuleType(name)
        module.torch = torch
        monkeypatch.setitem(sys.modules, name, module)
        for other in [other for other in sys.modules if other != name]:
            sys.modules[other] = sys.modules.pop(other)

    def key():
        return FxGraphCachePickler(torch.fx.GraphModule({}, torch.fx.Graph())).get_hash(torch.contiguous_format)

    monkeypatch.setattr(copyreg, "dispatch_table", copyreg.dispatch_table.copy())
    monkeypatch.delitem(copyreg.dispatch_table, torch.memory_format, raising=False)
    before = key()
    first_module("early")
    assert key() != before, "torch no longer names the first module: is same_keys_in_all_processes still needed?"
    copyreg.dispatch_table[torch.memory_format] = torch_internals._pickled_memory_format
    after = key()
    first_module("earlier")
    assert key() == after
    assert pickle.loads(pickle.dumps(torch.channels_last)) is torch.channels_last


def test_the_compilers_counts_exist():
    from torch._dynamo.utils import CompilationMetrics
    from torch._inductor.async_compile import maybe_warm_pool

    assert {"recompile_reason", "fail_type"} <= set(CompilationMetrics.__dataclass_fields__)
    assert not parameters(maybe_warm_pool)
    assert set(torch_internals.compilations()) == {
        "graphs",
        "recompiles",
        "graph_breaks",
        "compile_failures",
        "cached_graphs",
    }


def test_the_seeds_are_operations_of_inductor_and_the_pass_marks_them():
    from torch._inductor import inductor_prims  # noqa: F401  (registers them)
    from torch.utils.checkpoint import CheckpointPolicy

    drawn = [getattr(torch.ops.prims, name.removeprefix("prims::")).default for name in torch_internals.SEEDS]
    assert [operation.name() for operation in drawn] == list(torch_internals.SEEDS)
    graph = torch.fx.Graph()
    seeds = graph.call_function(drawn[1], (2, torch.device("cpu")))
    other = graph.call_function(torch.ops.aten.relu.default, (seeds,))
    torch_internals.KeepSeeds()(graph)
    assert seeds.meta["recompute"] is CheckpointPolicy.MUST_SAVE and "recompute" not in other.meta


def test_inductor_runs_the_pass_between_tracing_and_the_partitioner():
    """The effect of joint_custom_post_pass: an inductor that ignored it would leave wrong gradients behind."""
    import torch._dynamo
    import torch._inductor.config

    seen = []

    class Watched(torch_internals.KeepSeeds):
        def __call__(self, graph):
            super().__call__(graph)
            seen.extend(node.target.name() for node in graph.nodes if "recompute" in node.meta)

        def uuid(self) -> bytes:
            return id(self).to_bytes(8, "little")  # nothing out of the cache

    def layer(x):
        return nn.functional.dropout(x @ x, 0.5, True).sin()

    torch._dynamo.reset()
    with torch._inductor.config.patch(joint_custom_post_pass=Watched()):
        torch.compile(layer)(torch.randn(4, 4, requires_grad=True)).sum().backward()
    torch._dynamo.reset()
    assert set(seen) & set(torch_internals.SEEDS)


def test_no_kernel_makes_four_random_numbers_at_once():
    """The effect of keep_dropout_seeds on triton's code generation. No GPU is needed to ask."""
    import torch._inductor.config
    from torch._inductor.codegen.triton import TritonOverrides

    if not hasattr(TritonOverrides, "_can_use_4x_random"):
        assert Version(torch.__version__) < Version("2.13"), "torch has renamed it: are the masks still right?"
        return
    assert "_can_use_4x_random" in inspect.getsource(TritonOverrides.rand), "rand no longer asks: see the docstring"
    before = TritonOverrides.__dict__["_can_use_4x_random"]
    with torch._inductor.config.patch(joint_custom_post_pass=None):
        torch_internals.keep_dropout_seeds()
        assert TritonOverrides._can_use_4x_random() is False
    TritonOverrides._can_use_4x_random = before


def test_sdpas_choice_takes_the_arguments_we_give():
    q, kv = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    assert isinstance(torch._fused_sdp_choice(q, kv, kv, is_causal=True, enable_gqa=True), int)
    assert torch_internals.sdpa_takes_cudnn(4, 2, 16, torch.device("cpu")) is False


# --- transformers -----------------------------------------------------------------------------------------------------


def test_upstreams_model_has_what_ours_overrides_and_calls():
    from transformers import Qwen2VLForConditionalGeneration
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    rope = parameters(Qwen2VLModel.get_rope_index)
    assert rope[:2] == ["self", "input_ids"] and {"mm_token_type_ids", "image_grid_thw", "attention_mask"} <= set(rope)
    assert "rope_deltas" in inspect.getsource(Qwen2VLModel.__init__)
    assert parameters(Qwen2VLModel.get_image_features)[:3] == ["self", "pixel_values", "image_grid_thw"]
    prepare = parameters(Qwen2VLForConditionalGeneration.prepare_inputs_for_generation)
    assert {"input_ids", "is_first_iteration"} <= set(prepare)


def test_the_mapping_of_names_is_looked_up_by_class_name():
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration as Ours

    assert get_checkpoint_conversion_mapping("Qwen2VLForConditionalGeneration")
    assert get_checkpoint_conversion_mapping(Ours.__name__)


def test_attention_is_read_and_set_where_transformers_keeps_it():
    from transformers import Qwen2VLConfig, WhisperConfig

    config = WhisperConfig()
    transformers_internals.set_attention(config, "eager")
    assert transformers_internals.attention_of(config) == "eager"
    assert isinstance(transformers_internals.attention_of(Qwen2VLConfig()), str)
    assert parameters(transformers_internals.is_flash_attention_requested)[0] == "config"


# --- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted():
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).to(torch.bfloat16)
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    peft_model = get_peft_model(model, config, adapter_name=peft_internals.ADAPTER, autocast_adapter_dtype=False)
    for parameter in peft_internals.adapter_parameters(peft_model, str).values():
        parameter.data = parameter.data.float()
    return peft_model


def test_parameters_have_the_names_that_an_adapter_file_gives_them(adapted):
    from peft import get_peft_model_state_dict

    ours = peft_internals.adapter_parameters(adapted, str)
    assert set(ours) == set(get_peft_model_state_dict(adapted)), "as PEFT itself would write them"
    assert all(name.startswith(peft_internals.PREFIX) for name in ours)


def test_without_casts_a_lora_matrix_sees_its_input_as_it_came(adapted):
    """The effect, not the flag: PEFT may rename or ignore it."""
    lora_a = adapted.base_model.model[0].lora_A[peft_internals.ADAPTER]
    seen = []
    lora_a.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    x = torch.ones(1, 4, dtype=torch.bfloat16)

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return adapted.base_model.model[0](x)

    cast = forward()
    peft_internals.without_input_casts(adapted)
    bare = forward()
    peft_internals.without_input_casts(adapted)  # again changes nothing
    forward()
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert torch.equal(cast, bare)


def test_rotary_positions_are_applied_to_queries_and_keys_as_the_last_layer_asks_for_it():
    assert parameters(transformers_internals.apply_rotary_pos_emb)[:4] == ["q", "k", "cos", "sin"]
    x, angle = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[0.5, 0.5]]])
    queries, keys = transformers_internals.apply_rotary_pos_emb(x, 2 * x, angle.cos(), angle.sin())
    assert torch.allclose(queries, torch.tensor([[[[0.87758, 0.47943]]]])) and torch.allclose(keys, 2 * queries)


def test_the_vision_tower_takes_the_sizes_that_it_would_ask_the_gpu_for():
    from transformers.utils.generic import get_max_seqlen
    from transformers.vision_utils import get_vision_cu_seqlens

    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    assert parameters(transformers_internals.get_vision_position_ids)[:2] == ["grid_thw", "spatial_merge_size"]
    places = transformers_internals.get_vision_position_ids(grid, 2)
    assert places.shape == (28, 2) and places[:4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    marks = {name: object() for name in ("cu_seqlens", "max_seqlen", "position_ids")}
    assert get_vision_cu_seqlens(grid, kwargs=marks) and get_max_seqlen(grid, None, kwargs=marks)
    assert transformers_internals.get_vision_position_ids(grid, 2, kwargs=marks) and not marks


def test_an_attention_of_ours_is_called_by_its_name():
    from transformers import AttentionInterface

    transformers_internals.register_attention("surgvqa_test", len)
    assert AttentionInterface().get_interface("surgvqa_test", None) is len
