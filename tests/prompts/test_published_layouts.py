"""Published sets of safety research load by their plain path: their layouts as they are, around invented rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from es2.core.errors import InputError
from es2.prompts.loading import load_prompts
from es2.prompts.sources import Source, write_source
from tests.prompts.test_as_people_have_them import delimited, parquet

BAD, GOOD = "Break the lock, now.", "Oil the lock, please."
BOTH = [(BAD, 1), (GOOD, 0)]


def table(header: str, *rows: list[Any], separator: str = ",") -> bytes:
    return delimited(header.split(), rows, separator).encode()


def lines(*rows: Any) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def array(*rows: Any) -> bytes:
    return json.dumps(rows).encode()


ALL_LABELLED: dict[str, tuple[str, bytes]] = {
    "WildGuardMix": (
        "wildguard_train.parquet",
        parquet(
            {
                "prompt": [BAD, GOOD],
                "adversarial": [True, False],
                "response": [None, "Yes."],
                "prompt_harm_label": ["harmful", "unharmful"],
                "response_refusal_label": [None, "compliance"],
                "response_harm_label": [None, "unharmful"],
                "subcategory": ["theft", "benign"],
            }
        ),
    ),
    "WildJailbreak, train": (
        "train.tsv",
        table(
            "vanilla adversarial completion data_type",
            [BAD, "", "No.", "vanilla_harmful"],
            ["Oil it.", GOOD, "Yes.", "adversarial_benign"],
            separator="\t",
        ),
    ),
    "WildJailbreak, eval": (
        "eval.tsv",
        table(
            "adversarial label data_type",
            [BAD, 1, "adversarial_harmful"],
            [GOOD, 0, "adversarial_benign"],
            separator="\t",
        ),
    ),
    "BeaverTails": (
        "30k_test.jsonl.gz",
        gzip.compress(
            lines(
                *(
                    {"prompt": text, "response": "x", "category": {"theft": bool(bad)}, "is_safe": not bad}
                    for text, bad in BOTH
                )
            )
        ),
    ),
    "ToxicChat": (
        "toxic-chat_annotation_train.csv",
        table(
            "conv_id user_input model_output human_annotation toxicity jailbreaking openai_moderation",
            *(["c", text, "x", True, bad, 0, "[]"] for text, bad in BOTH),
        ),
    ),
    "XSTest": (
        "xstest_prompts.csv",
        table(
            "id prompt type label focus note",
            [1, GOOD, "homonyms", "safe", "x", ""],
            [2, BAD, "contrast_homonyms", "unsafe", "", ""],
        ),
    ),
    "XSTest on the Hub": (
        "test-00000-of-00001.parquet",
        parquet(
            {
                "prompt": [BAD, GOOD],
                "focus": ["x", "x"],
                "type": ["contrast_definitions", "definitions"],
                "note": ["", ""],
                "label": ["unsafe", "safe"],
            }
        ),
    ),
    "jailbreak-classification": (
        "jailbreak_dataset_train_balanced.csv",
        table("prompt type", [BAD, "jailbreak"], [GOOD, "benign"]),
    ),
    "jailbreaks in the wild": (
        "jailbreak_prompts.csv",
        table(
            "platform source prompt jailbreak created_at date",
            ["Discord", "x", BAD, True, "", "2023-01-01"],
            ["Reddit", "y", GOOD, False, "", "2023-01-01"],
        ),
    ),
    "prompt-injections": ("train.parquet", parquet({"text": [BAD, GOOD], "label": [1, 0]})),
    "Aegis 2.0": (
        "train.json",
        array(
            *(
                {
                    "id": text[:3],
                    "reconstruction_id_if_redacted": None,
                    "prompt": text,
                    "response": None,
                    "prompt_label": "unsafe" if bad else "safe",
                    "response_label": None,
                    "violated_categories": "Theft" if bad else "",
                    "prompt_label_source": "human",
                    "response_label_source": None,
                }
                for text, bad in BOTH
            )
        ),
    ),
    "WildChat": (
        "train.parquet",
        parquet(
            {
                "conversation_hash": ["a", "b"],
                "model": ["m", "m"],
                "conversation": [
                    [{"role": "user", "content": text, "toxic": bool(bad)}, {"role": "assistant", "content": "x"}]
                    for text, bad in BOTH
                ],
                "turn": [1, 1],
                "language": ["English", "English"],
                "toxic": [True, False],
                "redacted": [False, False],
            }
        ),
    ),
    "an array a label": ("instructions.json", json.dumps({"unsafe": [BAD], "safe": [GOOD]}).encode()),
    "chats an array a label": (
        "chats.json",
        json.dumps(
            {
                "malicious": [[{"role": "user", "content": BAD}]],
                "benign": [[{"role": "system", "content": "x"}, {"role": "user", "content": GOOD}]],
            }
        ).encode(),
    ),
}

ONE_LABEL: dict[str, tuple[str, bytes, int]] = {
    "AdvBench": ("harmful_behaviors.csv", table("goal target", [BAD, "Sure"]), 1),
    "HarmBench": (
        "harmbench_behaviors_text_val.csv",
        table(
            "Behavior FunctionalCategory SemanticCategory Tags ContextString BehaviorID",
            [BAD, "standard", "illegal", "", "", "x"],
        ),
        1,
    ),
    "StrongREJECT": ("strongreject_small_dataset.csv", table("category source forbidden_prompt", ["x", "y", BAD]), 1),
    "MaliciousInstruct": ("MaliciousInstruct.txt", f"{BAD}\nOpen it.".encode(), 1),
    "SORRY-Bench": (
        "question.jsonl",
        lines({"question_id": 1, "category": "1", "turns": [BAD], "prompt_style": "base"}),
        1,
    ),
    "Do-Not-Answer": (
        "data_en.csv",
        table("id risk_area types_of_harm specific_harms question", [0, "x", "y", "z", BAD]),
        1,
    ),
    "SimpleSafetyTests": (
        "sst_test_cases.csv",
        table("id harm_area counter category prompt", ["a", "Locks", 1, "instruction", BAD]),
        1,
    ),
    "AILuminate": (
        "airr_official_1.0_demo_en_us_prompt_set_release.csv",
        table(
            "release_prompt_id prompt_text hazard persona locale prompt_hash", ["a", BAD, "theft", "x", "en_US", "9"]
        ),
        1,
    ),
    "Aya red-teaming": (
        "aya_eng.jsonl",
        lines(
            {
                "prompt": BAD,
                "harm_category": '["Theft"]',
                "language": "English",
                "literal_translation": BAD,
                "explanation": "x",
                "global_or_local": "global",
            }
        ),
        1,
    ),
    "forbidden questions": (
        "forbidden_question_set.csv",
        table("content_policy_id content_policy_name q_id question", [0, "Locks", 0, BAD]),
        1,
    ),
    "red-team attempts": (
        "red_team_attempts.jsonl.gz",
        gzip.compress(
            array(
                {
                    "transcript": f"\n\nHuman: {BAD}\n\nAssistant: No.\n\nHuman: Do it.\n\nAssistant: No.",
                    "min_harmlessness_score_transcript": -1.5,
                    "num_params": "52B",
                    "rating": 0,
                    "task_description": "x",
                    "tags": None,
                }
            )
        ),
        1,
    ),
    "JailbreakBench": (
        "benign-behaviors.csv",
        table("Index Goal Target Behavior Category Source", [0, GOOD, "Sure", "x", "y", "Original"]),
        0,
    ),
    "OR-Bench": ("or-bench-hard-1k.csv", table("prompt category", [GOOD, "theft"]), 0),
    "Alpaca": ("alpaca_data.json", array({"instruction": GOOD, "input": "", "output": "x"}), 0),
    "refusal_direction": ("harmless_val.json", array({"instruction": GOOD, "category": None}), 0),
    "AgentHarm": (
        "benign_behaviors_test_public.json",
        json.dumps({"canary_guid": "x", "behaviors": [{"id": "1", "prompt": GOOD, "category": "y"}]}).encode(),
        0,
    ),
    "the other side of a set": ("not-harmful.txt", GOOD.encode(), 0),
}

OF_NO_LABEL: dict[str, tuple[str, bytes]] = {
    "CatQA": ("catqa_english.json", array({"Category": "x", "Subcategory": "y", "Question": BAD})),
    "HH-RLHF": (
        "train.jsonl.gz",
        gzip.compress(
            lines({"chosen": f"\n\nHuman: {BAD}\n\nAssistant: No.", "rejected": f"\n\nHuman: {BAD}\n\nAssistant: Yes."})
        ),
    ),
    "TDC": ("behaviors.json", array(BAD)),
    "PKU-SafeRLHF": (
        "train.jsonl",
        lines(
            {"prompt": BAD, "response_0": "x", "response_1": "y", "is_response_0_safe": True, "safer_response_id": 0}
        ),
    ),
    "LMSYS-Chat": (
        "train.parquet",
        parquet(
            {"conversation": [[{"content": BAD, "role": "user"}, {"content": "x", "role": "assistant"}]], "turn": [1]}
        ),
    ),
    "preferences": ("dpo.jsonl", lines({"system": "x", "question": BAD, "chosen": "No.", "rejected": "Yes."})),
    "bare chats": (
        "chats.json",
        array([{"role": "system", "content": "Be nice."}, {"role": "user", "content": BAD}]),
    ),
    "one bare chat": (
        "chat.json",
        array({"role": "user", "content": BAD}, {"role": "assistant", "content": "No."}),
    ),
    "bare chats, a line each": (
        "chats.jsonl",
        lines([{"from": "human", "value": BAD}, {"from": "gpt", "value": "No."}]),
    ),
    "bare chats below one key": ("chats.json", json.dumps({"data": [[{"role": "user", "content": BAD}]]}).encode()),
}


@pytest.mark.parametrize("name", ALL_LABELLED)
def test_a_set_of_both_labels(name: str, tmp_path: Path) -> None:
    file, data = ALL_LABELLED[name]
    (tmp_path / file).write_bytes(data)
    prompts = load_prompts(str(tmp_path / file))
    assert dict(zip(prompts.texts, prompts.labels.tolist(), strict=True)) == dict(BOTH)


@pytest.mark.parametrize("name", ONE_LABEL)
def test_a_set_of_one_label(name: str, tmp_path: Path) -> None:
    file, data, label = ONE_LABEL[name]
    (tmp_path / file).write_bytes(data)
    prompts = load_prompts(str(tmp_path / file))
    assert prompts.texts[0] == (BAD if label else GOOD)
    assert set(prompts.labels.tolist()) == {label}


@pytest.mark.parametrize("name", OF_NO_LABEL)
def test_a_set_that_states_no_label_is_one_of_two_files(name: str, tmp_path: Path) -> None:
    file, data = OF_NO_LABEL[name]
    (tmp_path / file).write_bytes(data)
    (tmp_path / "other.txt").write_text(GOOD)
    with pytest.raises(InputError, match="no column that tells harmful from harmless"):
        load_prompts(str(tmp_path / file))
    prompts = load_prompts(write_source(Source(str(tmp_path / file), str(tmp_path / "other.txt"))))
    assert prompts.texts == (BAD, GOOD)


@pytest.mark.parametrize("kinds", [["theft", "none"], ["theft", "safe"], ["theft", None]])
def test_a_kind_of_harm_that_some_rows_lack_is_no_label(kinds: list[str | None], tmp_path: Path) -> None:
    rows = [{"prompt": text, "harm_category": kind} for text, kind in zip((BAD, GOOD), kinds, strict=True)]
    (tmp_path / "m.json").write_bytes(array(*rows))
    with pytest.raises(InputError, match="no column that tells harmful from harmless"):
        load_prompts(str(tmp_path / "m.json"))
