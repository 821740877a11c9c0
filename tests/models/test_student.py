import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, LongT5Config, MT5Config, T5Config, UMT5Config

from rlkd.models.encoder_decoder import EncoderDecoder
from rlkd.models.loading import load_model, protect_untied_head
from rlkd.models.policy import VALUE_HEAD_FILE, Policy
from rlkd.models.saving import save_student
from rlkd.objectives.policy import ppo_loss, reduce_tokens
from rlkd.sampling.decode import decode, sampler
from tiny import EOS, KINDS, PAD, VALID, tiny_model, tiny_t5

IDS = torch.tensor([[5, 6, 7, EOS], [9, EOS, PAD, PAD]])
INPUT_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
ANSWERS = torch.tensor([[8, 9, EOS], [10, PAD, PAD]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
BATCH = (IDS, INPUT_MASK, ANSWERS, MASK)


def policy_of(kind="t5", *, critic=False, **options):
    return Policy(EncoderDecoder(tiny_model(kind, **options), VALID), critic=critic)


def with_random_critic(policy):
    torch.manual_seed(3)
    for p in policy.value_head.parameters():
        torch.nn.init.normal_(p)
    return policy


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_log_probs_and_entropies_equal_those_of_the_models_own_logits(kind):
    policy = policy_of(kind)
    (logps, entropy), values = policy(*BATCH)
    start = policy.config.decoder_start_token_id
    for i in range(2):
        answer, prompt = ANSWERS[i][MASK[i]].tolist(), IDS[i][INPUT_MASK[i]]
        out = policy.student(input_ids=prompt[None], decoder_input_ids=torch.tensor([[start, *answer[:-1]]]))
        log_p = out.logits[0, :, :VALID].log_softmax(-1)
        for t, a in enumerate(answer):
            assert float(logps[i, t]) == pytest.approx(float(log_p[t, a]), abs=1e-5)
            assert float(entropy[i, t]) == pytest.approx(float(-(log_p[t].exp() * log_p[t]).sum()), abs=1e-5)
    assert not logps[~MASK].any()
    assert not entropy[~MASK].any()
    assert not values.any()


def test_token_arguments_reach_the_statistics_beside_their_token():
    def echo(logits, ids, weight, vector):
        return ids.float(), weight * vector.sum(-1)

    weight, vector = torch.randn(2, 3), torch.randn(2, 3, 4)
    (ids, product), _ = policy_of()(*BATCH, echo, (weight, vector))
    assert torch.equal(ids, ANSWERS.float() * MASK)
    torch.testing.assert_close(product, weight * vector.sum(-1) * MASK)


@pytest.mark.parametrize("kind", KINDS)
def test_first_update_has_ratio_one_in_training_mode(kind):
    """METHOD check 10: what was recorded while sampling is what the loss recomputes (dropout is 0)."""
    policy = policy_of(kind).train()
    lm = policy.lm
    with torch.no_grad():
        states = lm.prompt_states([[5, 6, 7, EOS], [9, EOS]])
    drawn = decode(lm, states, sampler([1, 2], 6, torch.device("cpu")), max_new_tokens=6)
    (logps, _), _ = policy(IDS, INPUT_MASK, drawn.ids, drawn.mask)
    ratio = (logps - drawn.logps)[drawn.mask].exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=2e-5, rtol=0)


def test_a_new_critic_says_zero_and_learns_with_the_student():
    policy = policy_of(critic=True)
    assert not policy(*BATCH)[1].any()
    with_random_critic(policy)
    values = policy(*BATCH)[1]
    assert values[MASK].all()
    assert not values[~MASK].any()
    ((values - 1)[MASK] ** 2).sum().backward()
    assert policy.value_head.weight.grad.abs().sum() > 0
    assert policy.value_head.bias.grad.abs().sum() > 0
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in policy.student.decoder.final_layer_norm.parameters()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_policy_gradient_reaches_every_student_parameter_and_equals_that_of_full_logits(kind):
    policy = policy_of(kind)
    advantages = torch.tensor([[1.0, -2.0, 0.5], [3.0, 0.0, 0.0]])
    (logps, _), _ = policy(*BATCH)
    reduce_tokens(ppo_loss(logps, logps.detach(), advantages, 0.2), MASK, "token_mean").backward()
    got = {name: p.grad for name, p in policy.student.named_parameters()}

    plain = tiny_model(kind)
    start = torch.full((2, 1), plain.config.decoder_start_token_id)
    shifted = torch.cat([start, ANSWERS[:, :-1]], 1)
    ones = torch.ones_like(shifted)
    logits = plain(
        input_ids=IDS, attention_mask=INPUT_MASK.long(), decoder_input_ids=shifted, decoder_attention_mask=ones
    ).logits[..., :VALID]
    chosen = logits.log_softmax(-1).gather(-1, ANSWERS[..., None]).squeeze(-1)
    (-(advantages * chosen)[MASK].sum() / 4).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(got[name], p.grad, atol=1e-5, rtol=1e-4, msg=name)
        assert got[name].abs().sum() > 0 or "k_proj.bias" in name, name


def test_frozen_copy_is_independent_and_without_gradients():
    policy = with_random_critic(policy_of("t5-untied", critic=True))
    frozen = policy.frozen_copy()
    assert frozen.lm.model is frozen.student is not policy.student
    before = copy.deepcopy(frozen.state_dict())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, before[name]), name
    frozen.student.tie_weights()
    assert torch.equal(frozen.student.lm_head.weight, before["student.lm_head.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_save_writes_a_plain_model(kind, tmp_path):
    policy = with_random_critic(policy_of(kind, critic=True))
    policy.save(tmp_path)
    policy.save_value_head(tmp_path)
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert not any("value" in key for key in load_file(tmp_path / "model.safetensors"))
    for (name, want), got in zip(policy.student.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
    assert (tmp_path / VALUE_HEAD_FILE).exists()


def test_the_critic_is_saved_only_when_asked_for(tmp_path):
    policy_of(critic=True).save(tmp_path)
    policy_of().save_value_head(tmp_path)
    assert not (tmp_path / VALUE_HEAD_FILE).exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("critic", [True, False])
def test_load_restores_what_save_wrote(kind, critic, tmp_path):
    saved, other = policy_of(kind, seed=1, critic=critic), policy_of(kind, seed=2, critic=critic)
    if critic:
        with_random_critic(saved)
    saved.save(tmp_path)
    saved.save_value_head(tmp_path)
    parameters = {name: p.data_ptr() for name, p in other.named_parameters()}
    other.load(tmp_path)
    for name, value in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    # In place: an optimizer keeps references to the same parameters.
    assert parameters == {name: p.data_ptr() for name, p in other.named_parameters()}
    with torch.no_grad():
        for one, two in zip(saved(*BATCH)[0], other(*BATCH)[0], strict=True):
            assert torch.equal(one, two)


def test_loading_a_folder_without_the_critic_fails(tmp_path):
    policy = policy_of(critic=True)
    policy.save(tmp_path)
    with pytest.raises(OSError, match=VALUE_HEAD_FILE):
        policy.load(tmp_path)


def lora_policy(seed):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM", init_lora_weights=False)
    student = tiny_t5()
    torch.manual_seed(seed)
    return Policy(EncoderDecoder(get_peft_model(student, config), VALID), critic=True)


def test_adapters_are_scored_trained_saved_and_loaded(tmp_path):
    saved, other = lora_policy(0), lora_policy(1)
    (logps, _), _ = saved(*BATCH)
    logps.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in saved.student.parameters())
    with torch.no_grad():
        assert not torch.allclose(other(*BATCH)[0][0], logps)
        saved.save(tmp_path)
        saved.save_value_head(tmp_path)
        other.load(tmp_path)
        torch.testing.assert_close(other(*BATCH)[0][0], logps)
        merged = Policy(EncoderDecoder(copy.deepcopy(saved.student).merge_and_unload(), VALID))
        torch.testing.assert_close(merged(*BATCH)[0][0], logps, atol=1e-5, rtol=1e-5)


SHAPE = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8, "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
FORMS = {
    "t5": (T5Config, True, "relu"),
    "t5 gated": (T5Config, True, "gated-gelu"),
    "t5 v1.1": (T5Config, False, "gated-gelu"),
    "t5 untied": (T5Config, False, "relu"),
    "mt5": (MT5Config, False, "gated-gelu"),
    "mt5 tied": (MT5Config, True, "gated-gelu"),
    "umt5": (UMT5Config, True, "gated-gelu"),
    "umt5 untied": (UMT5Config, False, "gated-gelu"),
    "longt5": (LongT5Config, True, "relu"),
    "longt5 untied": (LongT5Config, False, "gated-gelu"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_config_says_what_older_versions_read_in_it(form, tmp_path):
    """transformers 4 and converters tie the head, and scale its input by 1 / sqrt(d_model), by one field alone."""
    kind, tied, activation = FORMS[form]
    torch.manual_seed(0)
    options = SHAPE | {"feed_forward_proj": activation} | ({} if tied else {"tie_word_embeddings": False})
    model = AutoModelForSeq2SeqLM.from_config(kind(**options)).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(40, 16))
        protect_untied_head(model)
    before = (model.config.tie_word_embeddings, {name: w.clone() for name, w in model.state_dict().items()})
    save_student(model, tmp_path)
    field = json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    weights = load_file(tmp_path / "model.safetensors")
    ids, decoder_ids = torch.tensor([[5, 6, 7, 8, 1]]), torch.tensor([[0, 5, 6]])
    with torch.no_grad():
        out = model(input_ids=ids, decoder_input_ids=decoder_ids, output_hidden_states=True)
    # The rule of transformers 4, for what the decoder gives.
    hidden = out.decoder_hidden_states[-1]
    hidden = hidden * 16**-0.5 if field else hidden
    head = weights["shared.weight"] if field else weights["lm_head.weight"]
    torch.testing.assert_close(hidden @ head.T, out.logits, atol=1e-5, rtol=1e-5)
    # And that of this version, by which a run resumes.
    again = load_model(str(tmp_path), "student").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids, decoder_input_ids=decoder_ids).logits, out.logits)
    assert model.config.tie_word_embeddings == before[0]
    assert all(torch.equal(w, before[1][name]) for name, w in model.state_dict().items())
