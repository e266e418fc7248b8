import gc
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM

from args import ConfigError, TrainArgs
from model import (
    DrawnAgain,
    build_model,
    check_first_loss,
    count_targets,
    draw_weights,
    find_model,
    layerdrop_problems,
    learning_rate,
    load_tokenizer,
    parameter_groups,
    recompute_layers,
    shape_of,
    summed_loss,
    without_weights,
)
from opt_sizes import OPT_SHAPES
from planner import layout_problems

TINY = TrainArgs(model_name_or_path="tiny", from_scratch=True)


def tiny_source(**changes):
    return find_model(TrainArgs(model_name_or_path="tiny", from_scratch=True, **changes))


@pytest.fixture
def opt_folder(tmp_path):
    build_model(tiny_source(), seed=0).save_pretrained(tmp_path / "opt")
    return tmp_path / "opt"


def test_the_loss_is_the_sum_of_negative_log_probabilities_of_the_real_targets():
    logits = torch.tensor([[[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [9.0, 9.0, 9.0]]])
    labels = torch.tensor([[0, 2, -100]])
    by_hand = -math.log(math.exp(2) / (1 + math.exp(1) + math.exp(2)))
    assert summed_loss(logits, labels).item() == pytest.approx(by_hand, rel=1e-6)
    assert count_targets(labels) == 1


def test_a_batch_of_padding_alone_has_loss_zero_and_no_gradient():
    logits = torch.randn(2, 4, 5, requires_grad=True)
    loss = summed_loss(logits, torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_padding_on_the_right_changes_no_loss_though_no_mask_is_passed():
    model = build_model(tiny_source(), seed=0).eval()
    ids = torch.randint(5, 1000, (1, 9))
    padded = torch.nn.functional.pad(ids, (0, 6), value=1)
    labels = torch.nn.functional.pad(ids, (0, 6), value=-100)
    assert torch.allclose(model(input_ids=ids, labels=ids).loss, model(input_ids=padded, labels=labels).loss, rtol=1e-6)


@pytest.mark.parametrize("size", ["tiny", "125m", "350m"])
def test_the_built_model_has_exactly_the_parameters_of_the_table(size):
    source = find_model(TrainArgs(model_name_or_path=size, from_scratch=True))
    with torch.device("meta"):
        model = OPTForCausalLM(source.config)
    assert model.num_parameters() == OPT_SHAPES[size].num_params


def test_the_same_seed_builds_the_same_weights():
    first, second = (build_model(tiny_source(), seed=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_biases_and_layer_norms_are_not_decayed():
    decayed, free = parameter_groups(build_model(tiny_source(), seed=0), 0.1)
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in free["params"]} == {1}


def test_a_local_folder_gives_back_its_weights(opt_folder):
    source = find_model(TrainArgs(model_name_or_path=str(opt_folder)))
    loaded, written = build_model(source, seed=1), build_model(tiny_source(), seed=0)
    assert source.pretrained
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), written.parameters(), strict=True))


def test_a_folder_with_bin_weights_loads_too(opt_folder):
    state = OPTForCausalLM.from_pretrained(opt_folder).state_dict()
    (opt_folder / "model.safetensors").unlink()
    torch.save(state, opt_folder / "pytorch_model.bin")
    loaded = build_model(find_model(TrainArgs(model_name_or_path=str(opt_folder))), seed=1)
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"])


def test_weights_that_do_not_fill_the_model_are_refused(opt_folder):
    model = OPTForCausalLM.from_pretrained(opt_folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.3.fc1" not in name}
    (opt_folder / "model.safetensors").unlink()
    torch.save(state, opt_folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"lack 2 tensors, first model.decoder.layers.3.fc1.bias"):
        build_model(find_model(TrainArgs(model_name_or_path=str(opt_folder))), seed=1)


def test_weights_that_cannot_be_read_are_one_clear_error(opt_folder):
    (opt_folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="its weights cannot be read"):
        build_model(find_model(TrainArgs(model_name_or_path=str(opt_folder))), seed=1)


def test_the_weights_come_from_the_folder_for_downloads_too(opt_folder, tmp_path, monkeypatch):
    source = find_model(TrainArgs(model_name_or_path=str(opt_folder), cache_dir=str(tmp_path / "cache")))
    asked = {}

    def from_pretrained(name: str, **options: object) -> None:
        asked.update(options)
        raise OSError("asked")

    monkeypatch.setattr("model.AutoModelForCausalLM.from_pretrained", from_pretrained)
    with pytest.raises(ConfigError, match="asked"):
        build_model(source, seed=1)
    assert asked["cache_dir"] == str(tmp_path / "cache")


def test_a_pretrained_start_at_chance_is_an_error(opt_folder):
    source = find_model(TrainArgs(model_name_or_path=str(opt_folder)))
    check_first_loss(4.0, source)
    check_first_loss(10.8, tiny_source())
    with pytest.raises(ConfigError, match="the weights were not loaded"):
        check_first_loss(10.8, source)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./no/such/folder", "no such folder"),
        ("175b", "not public"),
        ("no-such-org/opt-7b", "cannot be had from the hub"),
    ],
)
def test_an_unknown_model_is_one_clear_error(name, reason, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=reason):
        find_model(TrainArgs(model_name_or_path=name))


def test_a_folder_without_weights_names_what_it_lacks(opt_folder):
    (opt_folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no"):
        find_model(TrainArgs(model_name_or_path=str(opt_folder)))


def test_a_run_and_its_checkpoints_are_no_models_and_say_where_one_is(opt_folder):
    (opt_folder / "states-00-0000.safetensors").touch()
    with pytest.raises(ConfigError, match=f"--export {opt_folder} --output_dir"):
        find_model(TrainArgs(model_name_or_path=str(opt_folder)))
    opt_folder.rename(opt_folder.with_name("final"))
    with pytest.raises(ConfigError, match=f"did you mean {opt_folder.parent / 'final'}"):
        find_model(TrainArgs(model_name_or_path=str(opt_folder.parent)))


def test_a_tokenizer_with_more_words_than_the_model_is_refused(real_data):
    source = tiny_source()
    source.config.vocab_size = 1000
    args = TrainArgs(model_name_or_path="tiny", tokenizer_name=str(real_data / "opt-tokenizer"))
    with pytest.raises(ConfigError, match="50265 words, more than the model's 1000"):
        load_tokenizer(args, source)


def test_a_layout_that_does_not_divide_the_model_is_refused():
    args = TrainArgs(model_name_or_path="tiny", plugin="hybrid_parallel", tp=8, pp=5)
    found = layout_problems(args, "tiny", shape_of(tiny_source()))
    assert "--tp 8: must divide tiny's attention heads, 4" in found
    assert "--pp 5: needs at least 5 layers, tiny has 4" in found


def test_only_opt_is_divided_whatever_its_width():
    wide = replace(tiny_source(), config=OPTConfig(**{**tiny_source().config.to_dict(), "ffn_dim": 96}))
    shape = shape_of(wide)
    assert (shape.num_heads, shape.ffn_width) == (4, 96)
    args = TrainArgs(plugin="hybrid_parallel", tp=2, pp=2, pp_schedule="interleaved", num_model_chunks=3)
    (problem,) = layout_problems(args, wide.name, shape)
    assert problem == "--pp 2 x --num_model_chunks 3: needs at least 6 layers, tiny has 4"
    llama = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    other = replace(tiny_source(), config=llama)
    assert shape_of(other).num_heads == 0
    assert "split OPT only" in layout_problems(args, other.name, shape_of(other))[0]


def test_layers_left_out_at_random_are_refused_where_ranks_have_to_agree():
    source = tiny_source()
    source.config.layerdrop = 0.1
    (problem,) = layerdrop_problems(source, 2)
    assert "layerdrop to 0" in problem
    assert layerdrop_problems(source, 1) == layerdrop_problems(tiny_source(), 2) == []
    assert (shape_of(source).layerdrop, shape_of(tiny_source()).layerdrop) == (0.1, 0.0)


def test_the_learning_rate_follows_the_weights(opt_folder):
    assert learning_rate(TINY, tiny_source()) == OPT_SHAPES["tiny"].learning_rate
    assert learning_rate(TINY, find_model(TrainArgs(model_name_or_path=str(opt_folder)))) == 5e-5
    assert learning_rate(TrainArgs(learning_rate=0.5), tiny_source()) == 0.5


def test_only_the_first_layers_are_recomputed():
    model = build_model(tiny_source(), seed=0)
    recompute_layers(model, 3)
    assert [layer.gradient_checkpointing for layer in model.model.decoder.layers] == [True, True, True, False]


def test_recomputing_changes_no_gradient():
    ids = torch.randint(5, 1000, (2, 16))
    gradients = []
    for num_layers in (0, 4):
        model = build_model(tiny_source(dropout=0.0), seed=0)
        recompute_layers(model, num_layers)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(model.model.decoder.layers[0].fc1.weight.grad)
    assert torch.equal(*gradients)


def test_modules_go_to_their_place_as_they_are_drawn():
    def drawn(place=None):
        torch.manual_seed(0)
        return draw_weights(without_weights(tiny_source().config), torch.device("cpu"), place)

    whole, cast = drawn(), drawn(lambda module: module._apply(torch.Tensor.bfloat16, recurse=False))
    assert cast.lm_head.weight is cast.model.decoder.embed_tokens.weight
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter.bfloat16(), cast.get_parameter(name)), name


def count_parameters_in_memory():
    gc.collect()
    return sum(type(each) is nn.Parameter and not each.is_meta for each in gc.get_objects())


def test_weights_drawn_again_are_the_same_in_whatever_order_they_are_read():
    torch.manual_seed(7)
    model = draw_weights(without_weights(tiny_source().config), torch.device("cpu"))
    before = count_parameters_in_memory()
    again = DrawnAgain(tiny_source().config, 7, torch.device("cpu"))
    torch.rand(1)  # as a plugin may that takes the model in between
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert names[-1] == "lm_head.weight"
    for name in [*names, *reversed(names[:5])]:
        assert torch.equal(again(name), model.get_parameter(name)), name
    assert count_parameters_in_memory() - before <= 2  # of one module


def test_a_forward_pass_asks_the_device_nothing():
    # On the meta device whoever looks at a number fails; on a GPU the host would wait, and no longer run ahead.
    with torch.device("meta"):
        model = OPTForCausalLM(tiny_source().config)
        ids = torch.ones(2, 16, dtype=torch.int64)
    assert model(input_ids=ids, labels=ids).loss.is_meta
