import json

import pytest

from lens_neurons.errors import DataError, SettingError
from lens_neurons.facts import Facts
from lens_neurons.languages import DEMO_LANGUAGES


def make(templates, objects):
    subject = dict.fromkeys(templates, "X")
    return Facts.from_records([{"id": 1, "relation": "r", "subject": subject, "object": objects}], {"r": templates})


def test_the_packaged_facts_can_all_be_asked():
    facts = Facts.packaged()
    assert len(facts) >= 60
    assert set(facts.languages) == set(DEMO_LANGUAGES)
    for base in DEMO_LANGUAGES:
        target = "en" if base != "en" else "fr"
        asked = facts.prompts(base, target)
        assert (len(asked.prompts), asked.skipped, asked.missing) == (len(facts), 0, 0), base


def test_odd_and_even_ids_halve_the_packaged_facts():
    facts = Facts.packaged()
    assert len(facts.odd()) + len(facts.even()) == len(facts)
    assert abs(len(facts.odd()) - len(facts.even())) <= 1


def test_the_separator_is_the_base_language_s():
    facts = make({"en": "[X] is [Y].", "ja": "[X]：[Y]", "th": "[X] คือ [Y]"}, {"en": "red", "ja": "赤", "th": "แดง"})
    (english,) = facts.prompts("en", "ja").prompts
    assert (english.prompt, english.joiner, english.base_answer, english.target_answer) == ("X is", " ", "red", "赤")
    (japanese,) = facts.prompts("ja", "en").prompts
    assert (japanese.prompt, japanese.joiner) == ("X：", "")
    (thai,) = facts.prompts("th", "en").prompts
    assert (thai.prompt, thai.joiner) == ("X คือ", "")


def test_slots_in_the_middle():
    facts = make({"nl": "[X] werd in [Y] geboren.", "en": "[X] was born in [Y]."}, {"nl": "Rome", "en": "Rome"})
    assert facts.prompts("nl", "en").skipped == 1
    assert facts.prompts("nl", "en", mid_template="truncate").prompts[0].prompt == "X werd in"
    assert facts.prompts("nl", "en", mid_template="published").prompts[0].prompt == "X werd in geboren."
    with pytest.raises(SettingError, match="mid_template='x'"):
        facts.prompts("nl", "en", mid_template="x")


def test_bad_facts_are_sentences():
    with pytest.raises(DataError, match="needs both"):
        make({"en": "[X] is"}, {"en": "red"})
    with pytest.raises(DataError, match="have no 'fr'"):
        make({"en": "[X] is [Y]"}, {"en": "red"}).prompts("en", "fr")


def test_mlama_rows(tmp_path):
    row = {"template": "[X] is [Y] .", "sub_en": "Sky", "obj_en": "blue", "obj_fr": "bleu", "predicate_id": "P1"}
    french = {"template": "[X] est [Y] .", "sub_fr": "Ciel", "obj_en": "blue", "obj_fr": "bleu", "predicate_id": "P1"}
    (tmp_path / "en.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "fr.jsonl").write_text(json.dumps(french) + "\n")
    facts = Facts.from_dataset("json", languages=["en", "fr"], data_files=str(tmp_path / "{code}.jsonl"))
    (prompt,) = facts.prompts("fr", "en").prompts
    assert (prompt.prompt, prompt.base_answer, prompt.target_answer) == ("Ciel est", "bleu", "blue")


def test_rows_of_another_form_are_refused(tmp_path):
    (tmp_path / "en.jsonl").write_text('{"question": "?"}\n')
    with pytest.raises(DataError, match="has rows with question"):
        Facts.from_dataset("json", languages=["en"], data_files=str(tmp_path / "{code}.jsonl"))


def test_files_that_do_not_line_up_are_refused(tmp_path):
    for code, relations in (("en", ["P1", "P2"]), ("fr", ["P1", "P3"])):
        rows = [
            {"template": "[X] is [Y]", f"sub_{code}": "a", f"obj_{code}": "b", "predicate_id": relation}
            for relation in relations
        ]
        (tmp_path / f"{code}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(DataError, match=r"fact 1 .* relation 'P2' in one language and 'P3' in 'fr'"):
        Facts.from_dataset("json", languages=["en", "fr"], data_files=str(tmp_path / "{code}.jsonl"))


def test_bmlama_from_shared_data(shared):
    facts = Facts.from_dataset(
        "json", languages=["en", "ja", "th"], data_files=str(shared / "data/eval/bmlama53/{code}.jsonl.gz")
    )
    assert len(facts) == 600
    english = facts.prompts("en", "th")
    assert english.missing == 0
    assert len(english.prompts) + english.skipped == 600
    published = facts.prompts("ja", "en", mid_template="published")
    assert len(published.prompts) == 600
