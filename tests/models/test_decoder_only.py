"""Decoder-only models against transformers' own forward and generate: one prompt, no padding, no cache, float64."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from models.decoder_families import BOS, EOS, OTHER_EOS, PADDED, VALID, WINDOW, tiny_decoder
from transformers import AutoConfig, GenerationConfig

from rlkd.errors import ModelError
from rlkd.models.architectures import architecture_of, language_model
from rlkd.models.cut_vocabulary import cut_model
from rlkd.models.decoder_only import FAMILIES, NOISE, DecoderOnly
from rlkd.models.loading import load_model
from rlkd.models.policy import Policy
from rlkd.models.saving import evaluated_generation
from rlkd.models.teacher import Teacher
from rlkd.objectives.policy import token_statistics
from rlkd.sampling.decode import decode, greedy
from rlkd.sampling.proposal import TeacherGuide
from rlkd.tensors import pad_rows
from tiny import save_pretrained, tiny_tokenizer

# Those that are named in README; the others share their parts.
MAIN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi", "smollm3")
PROMPTS = [[5, 6, 8, 9, 10, 11, 12, 13, 14], [9], [4, 4, 4, 10, 11]]
ANSWERS = [[5, 6, 8, 9, 12, 11, EOS], [8, OTHER_EOS], [9, 10, 11, 12, 13, 14]]  # ended, ended otherwise, cut
IDS, MASK = pad_rows(ANSWERS, EOS)


def lm_of(family="llama", **options):
    return DecoderOnly(tiny_decoder(family, **options), VALID)


@torch.no_grad()
def plain(model, prompt, answer):
    """Logits [R, V] that predict `answer`."""
    double = copy.deepcopy(model).double()
    return double(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1, :VALID]


def logits_of(lm, prompts, answers, batch_tokens=4096):
    """By row, from states of the prompts."""
    ids, mask = pad_rows(answers, lm.pad_id)
    hidden = lm.answer_hidden(lm.prompt_states(prompts, batch_tokens), ids, mask, batch_tokens)
    return lm.head().logits(hidden).split([len(answer) for answer in answers])


def generated(model, prompt, **options):
    """Answers of transformers' generate to one prompt, end included, without ids that are no tokens."""
    settings = GenerationConfig(
        eos_token_id=[EOS, OTHER_EOS], pad_token_id=0, suppress_tokens=[*range(VALID, PADDED)], do_sample=False,
        **options,
    )  # fmt: skip
    rows = model.generate(torch.tensor([prompt]), generation_config=settings)[:, len(prompt) :].tolist()
    ends = [next((i + 1 for i, t in enumerate(row) if t in (EOS, OTHER_EOS)), len(row)) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)]


# -- every family ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_gives_the_models_own_logits_and_greedy_answers(family):
    """Together, with padding, from cached keys and values; and token by token."""
    lm = lm_of(family)
    for prompt, answer, got in zip(PROMPTS, ANSWERS, logits_of(lm, PROMPTS, ANSWERS), strict=True):
        np.testing.assert_allclose(got, plain(lm.model, prompt, answer), atol=2e-5, rtol=1e-5)
    out = decode(lm, lm.prompt_states(PROMPTS), greedy, max_new_tokens=8)
    for prompt, ids, mask in zip(PROMPTS, out.ids, out.mask, strict=True):
        assert generated(lm.model, prompt, max_new_tokens=8) == [ids[mask].tolist()]


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_switches_every_noise_off(family, tmp_path):
    model = tiny_decoder(family, noise=0.5)
    named = [name for name in NOISE if hasattr(model.config, name)]
    assert named
    folder = save_pretrained(tmp_path, model)
    loaded = load_model(folder, "student").train()
    assert all(getattr(loaded.config, name) == 0.0 for name in named)
    text = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(text).logits, model.eval()(text).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", MAIN)
def test_gradients_are_those_of_full_logits(family, monkeypatch):
    """A prompt that answers share is read once; else, and with gradient checkpointing, with each of its answers."""
    reads = []
    for name in ("_after_prompts", "_with_prompts"):
        method = getattr(DecoderOnly, name)
        monkeypatch.setattr(DecoderOnly, name, lambda *a, m=method, n=name: reads.append(n) or m(*a))
    shared = [*PROMPTS, PROMPTS[0]], [*ANSWERS, [13, EOS]]
    for (prompts, answers), checkpointing, read in (
        (shared, False, "_after_prompts"),
        (shared, True, "_with_prompts"),
        ((PROMPTS, ANSWERS), False, "_with_prompts"),
    ):
        own = tiny_decoder(family)
        for p, a in zip(prompts, answers, strict=True):
            logits = own(torch.tensor([[*p, *a]])).logits[0, len(p) - 1 : -1, :VALID]
            logits.log_softmax(-1)[range(len(a)), a].sum().backward()
        want = {name: p.grad for name, p in own.named_parameters()}
        policy = Policy(lm_of(family)).train()
        if checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        (logps, _), _ = policy(*pad_rows(prompts, EOS), *pad_rows(answers, EOS))
        logps.sum().backward()
        assert set(reads) == {read}
        reads.clear()
        for name, parameter in policy.student.named_parameters():
            torch.testing.assert_close(parameter.grad, want[name], atol=2e-5, rtol=1e-4, msg=name)


@torch.no_grad()
def test_a_state_of_training_can_be_decoded_from():
    lm = lm_of()
    want = decode(lm, lm.prompt_states(PROMPTS), greedy, max_new_tokens=4)
    with torch.enable_grad():
        states = DecoderOnly(lm.model.train(), VALID).prompt_states(PROMPTS)
    assert [state.tolist() for state in states] == PROMPTS
    assert torch.equal(decode(lm, states, greedy, max_new_tokens=4).ids, want.ids)


@pytest.mark.parametrize("family", MAIN)
@torch.no_grad()
def test_batches_and_padding_change_nothing(family):
    lm = lm_of(family)
    together = logits_of(lm, PROMPTS, ANSWERS)
    alone = [logits_of(lm, [p], [a])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    small = logits_of(lm, PROMPTS, ANSWERS, batch_tokens=1)
    padded = logits_of(lm, [*PROMPTS, [3] * 20], [*ANSWERS, [4] * 12])
    for i, row in enumerate(alone):
        for other in (together, small, padded):
            torch.testing.assert_close(other[i], row, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", MAIN)
def test_beam_search_is_generates(family):
    lm = lm_of(family)
    got = lm.beam_search(PROMPTS, num_beams=3, num_answers=2, max_new_tokens=6)
    want = [generated(lm.model, p, num_beams=3, num_return_sequences=2, max_new_tokens=6) for p in PROMPTS]
    assert got == [row for rows in want for row in rows]


# -- decoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_dropping_rows_keeps_the_others(family):
    """The longest prompt goes first, and its padding with it."""
    lm = lm_of(family)
    state, tokens = lm.start(lm.prompt_states(PROMPTS)), torch.tensor([8, 9, 10])
    state.step(None)
    state.step(tokens)
    state.keep(torch.tensor([1, 2]))
    assert state.mask.shape[1] == len(PROMPTS[2]) + 1 == state.cache.get_seq_length()
    got = lm.head().logits(state.step(torch.tensor([4, 5])))
    for row, (prompt, answer) in enumerate([(PROMPTS[1], [9, 4, 0]), (PROMPTS[2], [10, 5, 0])]):
        np.testing.assert_allclose(got[row], plain(lm.model, prompt, answer)[-1], atol=1e-5)


@torch.no_grad()
def test_a_sliding_window_hides_what_it_should():
    """A control: with full attention the same weights give other logits, so the tests above see the window."""
    lm = lm_of("mistral")
    full = tiny_decoder("mistral", sliding_window=64)
    full.load_state_dict(lm.model.state_dict())
    got = logits_of(lm, PROMPTS, ANSWERS)[0]
    assert len(PROMPTS[0]) > WINDOW
    assert (got - plain(full, PROMPTS[0], ANSWERS[0])).abs().max() > 0.1


def test_decoding_under_gradient_checkpointing_is_refused():
    lm = lm_of()
    lm.model.gradient_checkpointing_enable()
    lm.model.train()
    with pytest.raises(ModelError, match=r"keeps no keys and values to decode with\. Call model\.eval\(\) first"):
        lm.start(lm.prompt_states(PROMPTS))
    lm.model.eval()
    lm.start(lm.prompt_states(PROMPTS))


@torch.no_grad()
def test_a_state_holds_keys_and_values_of_its_prompt_alone():
    lm = lm_of("gemma3_text")
    states = lm.prompt_states(PROMPTS)
    # 2 layers, keys and values, 2 heads of 8.
    assert [len(state) for state in states] == [len(prompt) * 2 * 2 * 2 * 8 + 16 for prompt in PROMPTS]
    again = [state.clone() for state in states for _ in range(2)]
    ids, mask = IDS.repeat_interleave(2, 0), MASK.repeat_interleave(2, 0)
    one, twice = lm.answer_hidden(states, IDS, MASK), lm.answer_hidden(again, ids, mask)
    for row, pair in zip(one.split([*map(len, ANSWERS)]), twice.split([2 * len(a) for a in ANSWERS]), strict=True):
        torch.testing.assert_close(pair, torch.cat([row, row]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_mask_may_leave_out_any_token():
    lm = lm_of()
    mask = MASK.clone()
    mask[0, 2] = mask[1] = False
    mask[2, 0] = False
    got = lm.head().logits(lm.answer_hidden(lm.prompt_states(PROMPTS), IDS, mask))
    want = torch.cat([plain(lm.model, p, a)[m[: len(a)]] for p, a, m in zip(PROMPTS, ANSWERS, mask, strict=True)])
    np.testing.assert_allclose(got, want, atol=1e-5)


# -- the head ----------------------------------------------------------------------------------------------------------


def test_the_models_differ_in_what_the_head_must_get_right():
    heads = {family: lm_of(family).head() for family in ("llama", "gemma2", "granite", "cohere", "phi", "gpt2")}
    assert heads["gemma2"].softcap == 2.0
    assert heads["granite"].scale == pytest.approx(1 / 3)
    assert heads["cohere"].scale != 1.0
    assert heads["phi"].bias.abs().sum() > 0
    tied = tiny_decoder("gpt2")
    assert tied.lm_head.weight is tied.transformer.wte.weight


def test_a_quantised_head_is_refused():
    lm = lm_of()
    lm.model.lm_head.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="llm_int8_skip_modules"):
        lm.head()


@pytest.mark.parametrize("way", ["map", "loss"])
def test_the_soft_cap_has_its_gradient(way):
    """In states, weight and bias, by finite differences of plain arithmetic, with forbidden tokens."""
    from rlkd.models.heads import Head

    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=torch.double) for shape in ((5, 4), (9, 4), (9,)))
    ids, limits = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([[-1, 5], [-1, -1], [-1, 0], [3, -1], [-1, 6]])

    def value(hidden, weight, bias):
        head = Head(weight, bias, 0.7, 8, softcap=1.5)
        if way == "map":
            logps, entropy = head.map(token_statistics, hidden, ids, limits=limits, chunk_tokens=2)
            return (logps * torch.arange(1, 6)).sum() + entropy.sum()

        def loss(rows, outputs, values):
            return (outputs[0] * torch.arange(1, 6)[rows] + outputs[1]).sum(), None

        zeros = torch.zeros(5, dtype=torch.double)
        return head.loss(token_statistics, loss, hidden, ids, row_tokens=[1] * 5, values=zeros, limits=limits)[0]

    inputs = tuple(x.requires_grad_() for x in (hidden, weight, bias))
    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("combination", ["average", "pool"])
def test_several_templates_mix_logits_not_what_a_soft_cap_makes_of_their_mean(family, combination):
    tokenizer = tiny_tokenizer()
    lm = language_model(tiny_decoder(family, words=len(tokenizer)), tokenizer)
    teacher, valid = Teacher(lm, tokenizer, combination=combination), lm.valid_vocab
    texts = [("copy a b c", "is : a b c"), ("reverse d", "answer of d")]
    answers = [[3, 4, EOS], [6]]
    ids, mask = pad_rows(answers, EOS)
    signal = teacher.score(texts, ids, mask, distribution=True)
    got = signal.distribution.logits(*(args[mask] for args in signal.distribution.token_args))
    _, best = teacher.alternatives(signal.distribution, mask, 3)
    guide = TeacherGuide(teacher, texts, 0.5)
    row = 0
    for i, (pair, answer) in enumerate(zip(texts, answers, strict=True)):
        each = [plain(lm.model, tokenizer(t, add_special_tokens=False)["input_ids"], answer) for t in pair]
        mean = sum(x[:, :valid] for x in each) / 2
        np.testing.assert_allclose(got[row : row + len(answer)], mean, atol=1e-5)
        row += len(answer)
        np.testing.assert_allclose(best[i][mask[i]], mean.log_softmax(-1).topk(3).values, atol=1e-5)
        normalisers = [x[:, :valid].logsumexp(-1) for x in each]
        want = mean.logsumexp(-1) if combination == "pool" else sum(normalisers) / 2
        np.testing.assert_allclose(signal.logsumexp[i][mask[i]], want, atol=1e-5)
    first = guide.logits(None).log_softmax(-1)
    starts = torch.stack([got[0], got[len(answers[0])]]).log_softmax(-1)
    torch.testing.assert_close(first, starts, atol=1e-5, rtol=1e-5)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("bert", "an encoder, which writes no text"),
        ("mamba", "a state-space or recurrent model"),
        ("mixtral", "a mixture of experts, whose routers rlkd does not train"),
        ("bloom", "ALiBi"),
        ("gemma3", "take one for text alone"),
    ],
)
def test_other_architectures_are_refused_by_name(family, words):
    with pytest.raises(ModelError, match=rf"student 'x' has model_type '{family}', .*{words}.*Supported: t5, .*llama"):
        architecture_of(AutoConfig.for_model(family), "student", "x")


def test_half_of_an_encoder_decoder_is_refused():
    config = AutoConfig.for_model("bart", is_encoder_decoder=False)
    with pytest.raises(
        ModelError, match=r"teacher 'x' is a 'bart' model with no encoder \(is_encoder_decoder: false\)"
    ):
        architecture_of(config, "teacher", "x")


def test_what_fails_silently_is_refused():
    check = architecture_of(AutoConfig.for_model("gemma2"), "teacher", "g").check
    with pytest.raises(ModelError, match="teacher 'g': float16 overflows to inf in Gemma models"):
        check(AutoConfig.for_model("gemma2"), "teacher", "g", torch.float16)
    check(AutoConfig.for_model("llama"), "teacher", "g", torch.float16)
    with pytest.raises(ModelError, match=r"teacher 'g' has ALiBi .*alibi: true"):
        check(AutoConfig.for_model("falcon", alibi=True), "teacher", "g", torch.float32)


@pytest.mark.parametrize(("setting", "value"), [("forced_bos_token_id", 4), ("min_length", 3)])
def test_rules_of_whole_texts_are_refused(setting, value):
    lm = lm_of()
    setattr(lm.model.generation_config, setting, value)
    with pytest.raises(ModelError, match=f"sets {setting} = {value}, which in a decoder-only model counts the prompt"):
        _ = lm.rules


@pytest.mark.parametrize(("setting", "value"), [("repetition_penalty", 5.0), ("no_repeat_ngram_size", 1)])
def test_a_penalty_on_repetition_changes_neither_answers_nor_scores(setting, value):
    """Qwen's checkpoints ship one. Labels, rollouts and scores are of the same distribution, and so is what is saved:
    plain `generate()` of a student gives the answers that were evaluated.
    """
    lm, prompt = lm_of(), PROMPTS[0]
    plain = decode(lm, lm.prompt_states([prompt]), greedy, max_new_tokens=8)
    setattr(lm.model.generation_config, setting, value)
    assert generated(lm.model, prompt, max_new_tokens=8, **{setting: value})[0] != plain.ids[0].tolist()
    again = decode(lm, lm.prompt_states([prompt]), greedy, max_new_tokens=8)
    torch.testing.assert_close((again.ids, again.logps), (plain.ids, plain.logps))
    (beam,) = lm.beam_search([prompt], num_beams=2, num_answers=1, max_new_tokens=4)
    setattr(lm.model.generation_config, setting, None)
    assert [beam] == lm.beam_search([prompt], num_beams=2, num_answers=1, max_new_tokens=4)
    setattr(lm.model.generation_config, setting, value)
    lm.model.generation_config = evaluated_generation(lm, 8)
    want = lm.model.generate(torch.tensor([prompt]))[0, len(prompt) :].tolist()
    assert plain.ids[0][plain.mask[0]].tolist() == want


def test_a_rule_of_single_tokens_holds():
    lm = lm_of()
    first = generated(lm.model, PROMPTS[0], max_new_tokens=1)[0][0]
    lm.model.generation_config.suppress_tokens = [first]
    lm.model.generation_config.min_new_tokens = 3
    out = decode(lm, lm.prompt_states([PROMPTS[0]]), greedy, max_new_tokens=6)
    settings = GenerationConfig(
        eos_token_id=[EOS, OTHER_EOS], pad_token_id=0, suppress_tokens=[first, *range(VALID, PADDED)],
        min_new_tokens=3, max_new_tokens=6,
    )  # fmt: skip
    want = lm.model.generate(torch.tensor([PROMPTS[0]]), generation_config=settings)[0, len(PROMPTS[0]) :]
    assert out.ids[0].tolist() == want.tolist()[: out.ids.shape[1]]
    assert first not in out.ids[0]


def test_ends_starts_and_padding_come_from_the_checkpoint():
    lm = lm_of()
    assert (lm.rules.start_id, lm.rules.eos_ids, lm.pad_id, lm.width) == (None, (EOS, OTHER_EOS), EOS, 16)
    assert lm.model.config.bos_token_id == BOS
    lm.model.generation_config.pad_token_id = 5
    assert lm.pad_id == 5
    lm.model.generation_config.eos_token_id = lm.model.config.eos_token_id = None
    with pytest.raises(ModelError, match="has an eos_token_id, so no answer could end"):
        _ = lm.rules


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    from rlkd.models.spec import ModelSpec

    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    model = tiny_decoder(words=len(tokenizer))
    with pytest.raises(ModelError, match=r"model 'LlamaForCausalLM': its tokenizer has no end-of-sequence token"):
        language_model(model, tokenizer)
    folder = save_pretrained(tmp_path, model, tokenizer)
    (tmp_path / "model.safetensors").rename(tmp_path / "away")
    spec = ModelSpec(folder, "teacher")
    spec.__dict__["config"] = model.config  # weights are not looked at
    with pytest.raises(ModelError, match=r"teacher '.*': its tokenizer has no end-of-sequence token"):
        spec.check()
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == [EOS, OTHER_EOS]


# -- a smaller vocabulary ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "gemma2"])
@torch.no_grad()
def test_a_cut_model_has_the_logits_of_the_kept_tokens(family):
    """Head of its own, tied, with a bias, and capped."""
    model, keep = tiny_decoder(family), [0, EOS, BOS, 5, 6, OTHER_EOS, 9, 30]
    cut = DecoderOnly(cut_model(model, keep), len(keep))
    prompt, answer = [3, 5, 6], [9, 30, EOS]
    want = plain(model, prompt, answer)[:, keep]
    new = {old: i for i, old in enumerate(keep)}
    (got,) = logits_of(cut, [[new[i] for i in prompt]], [[new[i] for i in answer]])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert cut.rules.eos_ids == (new[EOS], new[OTHER_EOS])
    assert cut.model.get_input_embeddings().num_embeddings == len(keep)
