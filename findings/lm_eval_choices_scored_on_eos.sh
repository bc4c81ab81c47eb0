#!/usr/bin/env bash
# lm-eval's `hf`: over a tokenizer that ends with EOS, multiple choice scores EOS instead of the choices.
#
# Packages: lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0 (CPU). Seen on 2026-11-27.
# A good guess: `loglikelihood` scores the tokens of the choice behind the question, or refuses a tokenizer with which it
# cannot tell them apart; for BOS it has a rule.
# What happens: the choice is what is left of `encode(question + choice)` behind the length of `encode(question)`. With
# `add_eos_token=True` (a setting that tuning leaves in tokenizer_config.json) both end with EOS, so the cut is one token
# late: the choice's first token is lost and EOS is scored. Choices of one token all become one and the same request:
# equally likely, and the first of them is the answer. Nothing is raised or logged.
# Output seen:
#   scored for " red" and " red circle": [red] [red circle] without EOS, [</s>] [circle </s>] with; distinct scores of three choices: 3, 1
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 lm_eval==0.4.13 accelerate==1.15.0
cd "$work" && HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log <<'PY' || { cat log >&2; exit 1; }
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "red", "blue", "circle"]
raw = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                     num_attention_heads=2, max_position_embeddings=128))


def seen(eos):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(raw.to_str()), pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", add_bos_token=True, add_eos_token=eos)
    harness = HFLM(pretrained=model, tokenizer=tokenizer)
    scored = [tokenizer.decode(harness._encode_pair("what is this", choice)[1]) for choice in (" red", " red circle")]
    choices = [Instance("loglikelihood", {}, ("what is this", choice), n)
               for n, choice in enumerate((" red", " blue", " circle"))]
    return scored, len({round(likelihood, 4) for likelihood, _ in harness.loglikelihood(choices, disable_tqdm=True)})


(right, three), (wrong, one) = seen(False), seen(True)
print('scored for " red" and " red circle": [{}] [{}] without EOS, [{}] [{}] with'.format(*right, *wrong)
      + f"; distinct scores of three choices: {three}, {one}")
assert right == ["red", "red circle"] and wrong == ["</s>", "circle </s>"] and (three, one) == (3, 1), "changed"
PY
