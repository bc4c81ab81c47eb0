"""The arms of the ablation: ways of tuning one base on the same pictures, each a recipe with a few keys changed."""

from __future__ import annotations

from studies.arms.ablation import RATE, REPLAY, Ablation, Arm, Column, Question, stage, wings

ARMS = (
    Arm("projector", "connector only", "the decoder as it is, the connector trained on", "ways",
        changes=stage("projector", {"projector": RATE})),
    Arm("full", "full tuning", "LLaVA's way: every weight of the decoder, at the shared rate", "ways"),
    Arm("full-10x", "full tuning, 10x rate", "the same at ten times the rate, the published mismatch", "ways",
        recipe="full-10x"),
    Arm("full-replay", "full tuning, text replay", "every weight, with a quarter of the samples text", "ways",
        changes={"stages.0.data.text_replay": REPLAY}),
    Arm("lora", "LoRA", "low-rank updates of the decoder's linear layers, rank 64 (PEFT)", "ways", recipe="lora"),
    Arm("prefix", "prefix", "16 learned keys and values per layer (PEFT), at the shared rate", "ways",
        changes=stage("prefix", {"prefix": RATE, "projector": RATE})),
    Arm("prefix-10x", "prefix, 10x rate", "the same with the prefix at ten times the rate", "ways",
        changes=stage("prefix", {"prefix": 10 * RATE, "projector": RATE})),
    Arm("wings", "Wings (rank 64)", "frozen decoder, both learners, mass router, exact gate, normalized inputs", "ways",
        recipe="wings"),
    Arm("wings-visual", "only visual learners", "no textual learners, hence no router", "parts",
        changes=wings({"learners": ["visual"]})),
    Arm("wings-textual", "only textual learners", "no visual learners, hence no router", "parts",
        changes=wings({"learners": ["textual"]})),
    Arm("wings-constant", "constant router", "one learned pair of weights per layer", "parts",
        changes=wings({"router": "constant"})),
    Arm("wings-attention", "attention router", "the paper's: a learned weight per key position", "parts",
        changes=wings({"router": "attention"})),
    Arm("wings-paper-gate", "paper gate", "the textual learners always speak, also without an image", "parts",
        changes=wings({"gate": "paper"})),
    Arm("wings-plain", "not normalized", "queries and input rows as they come, as in the paper", "parts",
        changes=wings({"normalize": False})),
    Arm("wings-llm", "decoder tuned too", "the decoder trained as well, at a tenth of the shared rate", "parts",
        changes=wings({}, train={"llm": RATE / 10})),
    Arm("wings-llm-equal", "decoder tuned alike", "the decoder trained at the shared rate, the paper's way", "parts",
        changes=wings({}, train={"llm": RATE})),
    Arm("wings-rank-8", "rank 8", "learners of rank 8", "rank", changes=wings({"rank": 8})),
    Arm("wings-rank-32", "rank 32", "learners of rank 32", "rank", changes=wings({"rank": 32})),
    Arm("wings-rank-128", "rank 128", "learners of rank 128", "rank", changes=wings({"rank": 128})),
    Arm("wings-rate-third", "a third of the rate", "the learners at a third of the shared rate", "rate",
        changes=wings({}, train={"wings": RATE / 3})),
    Arm("wings-rate-3x", "3x rate", "the learners at three times the shared rate", "rate",
        changes=wings({}, train={"wings": 3 * RATE})),
    Arm("wings-long", "twice as long", "twice the steps, on as many more samples", "rate",
        changes={**wings({}), "stages.0.steps": 600}),
)  # fmt: skip

QUESTIONS = (
    Question("Full tuning at ten times the rate (the published mismatch) against the shared rate", "full-10x", "full"),
    Question("Wings against full tuning at the same rate", "wings", "full"),
    Question("Wings against LoRA", "wings", "lora"),
    Question("Wings against text replay", "wings", "full-replay"),
    Question("Wings against a prefix", "wings", "prefix"),
    Question("Wings against training the connector alone", "wings", "projector"),
    Question("Text replay against none, full tuning", "full-replay", "full"),
    Question("Only visual learners instead of both", "wings-visual", "wings"),
    Question("Only textual learners instead of both", "wings-textual", "wings"),
    Question("A constant router instead of one by attention mass", "wings-constant", "wings"),
    Question("The paper's attention router instead of one by attention mass", "wings-attention", "wings"),
    Question("The paper's gate instead of the exact one", "wings-paper-gate", "wings"),
    Question("Learner inputs as in the paper instead of normalized", "wings-plain", "wings"),
    Question("The decoder tuned too instead of frozen", "wings-llm", "wings"),
    Question("The decoder tuned at the same rate, instead of frozen", "wings-llm-equal", "wings"),
    Question("Wings with the decoder tuned against full tuning, at the same rate", "wings-llm-equal", "full"),
    Question("Rank 8 instead of 64", "wings-rank-8", "wings"),
    Question("Rank 32 instead of 64", "wings-rank-32", "wings"),
    Question("Rank 128 instead of 64", "wings-rank-128", "wings"),
    Question("A third of the learning rate", "wings-rate-third", "wings"),
    Question("Three times the learning rate", "wings-rate-3x", "wings"),
    Question("Twice the steps", "wings-long", "wings"),
)  # fmt: skip

WINGS = Ablation(
    name="wings",
    title="What in Wings keeps the words?",
    arms=ARMS,
    questions=QUESTIONS,
    columns=(
        Column("text_bare", "text bare: kept", "text bare", "bare text", kept=True),
        Column(
            "text_after_image", "text after an image: kept", "text after an image", "text after an image", kept=True
        ),
        Column("visual", "visual skill: right", "visual skill", "visual skill"),
    ),
    groups={
        "ways": "Ways of tuning",
        "parts": "Wings: learners, router, gate, decoder",
        "rank": "Wings: rank of the learners",
        "rate": "Wings: learning rate and length",
    },
    references={"parts": ("lora", "wings"), "rank": ("lora", "wings"), "rate": ("full", "wings")},
)
