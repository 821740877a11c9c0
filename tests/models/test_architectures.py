import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, BertConfig, ProphetNetConfig, T5Config, T5EncoderModel

from rlkd.errors import ModelError
from rlkd.models.architectures import language_model
from rlkd.models.batching import batches_by_length
from rlkd.models.cut_vocabulary import cut_model
from rlkd.models.encoder_decoder import BART_FAMILY, NOISE, T5_FAMILY, EncoderDecoder
from rlkd.models.loading import check_config, load_config, load_model, protect_untied_head, resolve_dtype
from rlkd.models.positions import Positions
from rlkd.sampling.decode import decode, greedy
from rlkd.tensors import pad_rows
from tiny import EOS, KINDS, PAD, VALID, save_pretrained, tiny_bart, tiny_model, tiny_t5, tiny_tokenizer

PROMPTS = [[5, 6, 7, 8, EOS], [9, EOS], [4, 4, 4, 10, 11, 12, EOS]]
ANSWERS = torch.tensor([[5, 6, 7, EOS], [8, EOS, PAD, PAD], [9, 10, 11, 12]])  # ended, padded, cut


def model_of(kind, **options):
    return EncoderDecoder(tiny_model(kind, **options), VALID)


def logits_of(lm, prompts, answers):
    ids, mask = pad_rows(prompts, PAD)
    return lm.head().logits(lm.hidden(lm.encode(ids, mask), mask, answers))


# -- the head and the decoder's input ------------------------------------------------------------------------------

SMALL = {"d_model": 16, "decoder_start_token_id": PAD, "pad_token_id": PAD, "eos_token_id": EOS, "vocab_size": 40}
SMALL_T5 = {
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "relative_attention_num_buckets": 8,
}
SMALL_SWITCH = {
    "num_experts": 2,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "router_jitter_noise": 0.5,
}
SMALL_BART = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "init_std": 0.3,
    "bos_token_id": PAD,
    "forced_eos_token_id": None,
    "dropout": 0.3,
    "attention_dropout": 0.3,
    "activation_dropout": 0.3,
    "encoder_layerdrop": 0.3,
    "decoder_layerdrop": 0.3,
}


def small_model(family):
    """A small random model of any supported family, with every source of noise in its configuration switched on."""
    torch.manual_seed(0)
    special = {
        "switch_transformers": SMALL_SWITCH,
        "longt5": {"local_radius": 4, "global_block_size": 2},
        "led": {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    }.get(family, {} if family in T5_FAMILY else {"max_position_embeddings": 64})
    options = {**SMALL, **(SMALL_T5 | {"dropout_rate": 0.3} if family in T5_FAMILY else SMALL_BART), **special}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **options))
    if family in BART_FAMILY:
        model.final_logits_bias.normal_()
    return model


@pytest.mark.parametrize("family", T5_FAMILY + BART_FAMILY)
def test_every_family_gives_the_models_own_logits_and_no_noise_in_training_mode(family, tmp_path):
    save_pretrained(tmp_path, small_model(family))
    model = load_model(str(tmp_path), "student")
    lm = EncoderDecoder(model, VALID)
    ids = torch.tensor([[5, 6, 7, 8, 9, EOS], [9, 4, 5, 11, 12, EOS]])
    answers = torch.tensor([[5, 6, 7], [8, EOS, PAD]])
    shifted = torch.tensor([[PAD, 5, 6], [PAD, 8, EOS]])
    mask = torch.ones_like(ids).bool()
    with torch.no_grad():
        want = model.eval()(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=shifted).logits[..., :VALID]
        for training in (False, True):
            model.train(training)
            got = lm.head().logits(lm.hidden(lm.encode(ids, mask), mask, answers))
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_head_of_hidden_is_the_models_own_logits(kind):
    lm = model_of(kind)
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        decoder_input = torch.tensor([[lm.start_id, *answer[:-1].tolist()]])
        with torch.no_grad():
            want = lm.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder_input).logits[..., :VALID]
            got = logits_of(lm, [prompt], answer[None])
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_the_tiny_models_differ_in_what_the_head_must_get_right():
    """Controls: a tied and scaled head, an untied unscaled one, a bias."""
    tied, untied, bart = (model_of(kind) for kind in KINDS)
    assert tied.head().scale == 0.25
    assert tied.head().weight is tied.model.shared.weight
    assert untied.head().scale == 1.0
    assert untied.head().weight is not untied.model.shared.weight
    assert bart.head().bias.abs().sum() > 0
    assert tied.head().bias is None


def test_quantised_head_is_refused():
    lm = model_of("t5")
    quantised = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    lm.model.lm_head.weight = quantised
    with pytest.raises(ModelError, match="llm_int8_skip_modules"):
        lm.head()


def test_special_ids_come_from_the_configuration():
    lm = model_of("bart")
    assert (lm.start_id, lm.eos_id, lm.pad_id) == (EOS, EOS, PAD)
    lm.config.eos_token_id = [EOS, 7]
    assert lm.eos_id == EOS


def tiny_t5gemma():
    """An encoder wider than the decoder, sliding windows in both, capped logits."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 40, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 3, "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 2.0, "initializer_range": 0.4, "bos_token_id": 2, "eos_token_id": EOS,
        "pad_token_id": PAD, "max_position_embeddings": 64,
    }  # fmt: skip
    config = AutoConfig.for_model(
        "t5gemma", encoder={**shape, "hidden_size": 24}, decoder={**shape, "hidden_size": 16}, vocab_size=40,
        dropout_rate=0.3, attention_dropout=0.3,
    )  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4) if parameter.dim() > 1 else parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def test_t5gemma_gives_its_own_logits_and_greedy_answers(tmp_path):
    model = load_model(save_pretrained(tmp_path, tiny_t5gemma()), "student").train()
    lm = language_model(model, tiny_tokenizer())
    assert (lm.start_id, lm.width, lm.head().softcap) == (2, 16, 2.0)
    plain = copy.deepcopy(model).eval()
    logits = logits_of(lm, PROMPTS, ANSWERS)
    for prompt, answer, got, n in zip(PROMPTS, ANSWERS, logits, (4, 2, 4), strict=True):
        shifted = torch.tensor([[2, *answer[: n - 1].tolist()]])
        want = plain(input_ids=torch.tensor([prompt]), decoder_input_ids=shifted).logits[0, :, :VALID]
        torch.testing.assert_close(got[:n], want, atol=1e-5, rtol=1e-5)
    model.eval()
    out = decode(lm, lm.prompt_states(PROMPTS), greedy, max_new_tokens=6)
    for prompt, ids, mask in zip(PROMPTS, out.ids, out.mask, strict=True):
        row = plain.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, suppress_tokens=[*range(VALID, 40)],
            decoder_start_token_id=2,
        )[0, 1:].tolist()  # fmt: skip
        assert ids[mask].tolist() == row[: len(ids[mask])]
    with pytest.raises(ModelError, match=r"float16 overflows to inf in T5"):
        check_config(plain.config, "teacher", "g", torch.float16)
    assert lm.positions == Positions(64, 64)
    with pytest.raises(ModelError, match=r"T5GemmaForConditionalGeneration has vocabularies in its parts"):
        cut_model(model, [0, 1, 2, 5])


# -- padding and batching (METHOD check 9) -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_rows_logits_do_not_change_with_batch_or_padding(kind):
    """Batch of 1 against batch of 3, other rows left out, a wider prompt and a wider answer; cut rows included."""
    lm = model_of(kind)
    together = logits_of(lm, PROMPTS, ANSWERS)
    some = logits_of(lm, PROMPTS[:2], ANSWERS[:2])
    wide = logits_of(lm, [*PROMPTS, [3] * 12], torch.cat([ANSWERS, torch.full((3, 2), PAD)], 1)[[0, 1, 2, 2]])
    lengths = [4, 2, 4]
    for i, n in enumerate(lengths):
        alone = logits_of(lm, PROMPTS[i : i + 1], ANSWERS[i : i + 1, :n])[0]
        for other in (together, wide, some if i < 2 else together):
            torch.testing.assert_close(other[i, :n], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "t5-untied"])
@torch.no_grad()
def test_t5_does_not_care_on_which_side_a_prompt_is_padded(kind):
    lm = model_of(kind)
    right, mask = pad_rows(PROMPTS, PAD)
    left = torch.stack([row.roll(int((~m).sum())) for row, m in zip(right, mask, strict=True)])
    left_mask = mask.flip(1)
    one, other = (
        lm.head().logits(lm.hidden(lm.encode(ids, m), m, ANSWERS)) for ids, m in ((right, mask), (left, left_mask))
    )
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_ids_do_not_matter_and_masking_does(kind):
    """A control of the two tests above: hide one real token and the logits move."""
    lm = model_of(kind)
    ids, mask = pad_rows(PROMPTS, PAD)
    reference = lm.hidden(lm.encode(ids, mask), mask, ANSWERS)
    other_ids = torch.where(mask, ids, 13)
    torch.testing.assert_close(lm.hidden(lm.encode(other_ids, mask), mask, ANSWERS), reference, atol=1e-5, rtol=1e-5)
    hidden_token = mask.clone()
    hidden_token[0, 1] = False
    assert (lm.hidden(lm.encode(ids, hidden_token), hidden_token, ANSWERS) - reference)[0].abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 10, 4096])
@torch.no_grad()
def test_prompt_states_equal_encoding_each_prompt_alone(kind, batch_tokens):
    lm = model_of(kind)
    states = lm.prompt_states(PROMPTS, batch_tokens)
    for prompt, state in zip(PROMPTS, states, strict=True):
        alone = lm.model.get_encoder()(input_ids=torch.tensor([prompt])).last_hidden_state[0]
        assert state.shape == (len(prompt), 16)
        torch.testing.assert_close(state, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_tokens", [1, 10, 4096])
@torch.no_grad()
def test_answer_hidden_is_packed_in_the_order_of_the_mask(kind, batch_tokens):
    """Whatever the mask leaves out: what is after an answer, a token within it, a whole answer."""
    lm = model_of(kind)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()
    got = lm.head().logits(lm.answer_hidden(lm.prompt_states(PROMPTS), ANSWERS, mask, batch_tokens))
    want = torch.stack([logits_of(lm, [p], a[None])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    torch.testing.assert_close(got, want[mask], atol=1e-5, rtol=1e-5)


def test_no_prompts_have_no_states():
    assert model_of("t5").prompt_states([]) == []


def test_batches_by_length_hold_every_row_once_within_the_budget():
    lengths = [3, 1, 9, 2, 2, 30, 1]
    batches = batches_by_length(lengths, batch_tokens=10)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 10
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)
    assert len(batches) == 4


# -- the untied head of T0, Flan-T5 and v1.1 -----------------------------------------------------------------------


def loaded_without_protection(folder):
    return AutoModelForSeq2SeqLM.from_pretrained(folder)


@pytest.mark.parametrize("disturb", ["tie_weights", "resize_token_embeddings"])
def test_untied_head_survives_what_ties_weights(disturb, tmp_path):
    original = tiny_t5(tied=False)
    folder = save_pretrained(tmp_path, original)

    def head_after(model):
        model.tie_weights() if disturb == "tie_weights" else model.resize_token_embeddings(50)
        return model.lm_head.weight.detach()

    protected = load_model(folder, "teacher")
    want = original.lm_head.weight.detach()
    assert torch.equal(head_after(protected)[: len(want)], want)
    assert protected.lm_head.weight is not protected.shared.weight
    # Control: as from_pretrained leaves the model, the head is overwritten by the embedding.
    bare = loaded_without_protection(folder)
    assert torch.equal(bare.lm_head.weight, want)
    assert not torch.equal(head_after(bare)[: len(want)], want)


def test_protection_survives_copying_saving_and_loading(tmp_path):
    model = copy.deepcopy(load_model(save_pretrained(tmp_path / "a", tiny_t5(tied=False)), "student"))
    want = model.lm_head.weight.detach().clone()
    model.tie_weights()
    again = load_model(save_pretrained(tmp_path / "b", model), "student")
    assert torch.equal(again.lm_head.weight, want)
    assert not again.config.scale_decoder_outputs


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_tied_heads_stay_tied(kind, tmp_path):
    model = load_model(save_pretrained(tmp_path, tiny_model(kind)), "student")
    protect_untied_head(model)
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight


# -- loading -------------------------------------------------------------------------------------------------------


def test_unsuitable_models_are_refused_by_their_configuration():
    with pytest.raises(ModelError, match="teacher 'bert' has model_type 'bert', an encoder, which writes no text"):
        check_config(BertConfig(), "teacher", "bert", torch.float32)
    with pytest.raises(ModelError, match=r"student 'p' has model_type 'prophetnet'\. Supported: t5, "):
        check_config(ProphetNetConfig(), "student", "p", torch.float32)
    with pytest.raises(ModelError, match=r"float16 overflows to inf in T5 .* teacher_dtype: bfloat16"):
        check_config(T5Config(), "teacher", "t5", torch.float16)
    check_config(T5Config(), "teacher", "t5", torch.bfloat16)
    check_config(tiny_bart().config, "teacher", "bart", torch.float16)


def test_unknown_dtype_is_refused():
    with pytest.raises(ModelError, match="teacher_dtype = 'half': allowed are float32, bfloat16, float16"):
        resolve_dtype("half", "teacher_dtype")
    assert resolve_dtype("bfloat16", "teacher_dtype") == torch.bfloat16


def test_missing_models_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"is a folder without config\.json"):
        load_config(str(tmp_path), "teacher")
    with pytest.raises(ModelError, match=r"teacher '.*nowhere' is neither a local folder nor a model"):
        load_config(str(tmp_path / "nowhere"), "teacher")


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """An encoder-only checkpoint has the right configuration; its decoder would silently be random."""
    model = tiny_t5()
    T5EncoderModel(copy.deepcopy(model.config)).save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"lacks \d+ weights .* decoder\.block\.0.*, \.\.\.\. Point it at a complete t5"
    ):
        load_model(str(tmp_path), "teacher")


@pytest.mark.parametrize("kind", KINDS)
def test_loading_keeps_the_weights_and_switches_every_dropout_off(kind, tmp_path):
    original = tiny_model(kind, dropout=0.5)
    model = load_model(save_pretrained(tmp_path, original), "student")
    for (name, want), got in zip(original.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
    assert all(getattr(model.config, key, 0.0) == 0.0 for key in NOISE)
    assert all(m.p == 0 for m in model.modules() if isinstance(m, torch.nn.Dropout))


def test_loading_casts_to_the_requested_precision(tmp_path):
    model = load_model(save_pretrained(tmp_path, tiny_t5()), "teacher", dtype="bfloat16")
    assert model.dtype == torch.bfloat16
