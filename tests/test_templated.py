"""Attention of texts that are templated already is kept apart from that of the same texts in a template."""

from dataclasses import replace

from twdpo.config import TrainConfig
from twdpo.judge.extraction import describe_extraction
from twdpo.judge.verbalize import Scoring
from twdpo.models.source import open_model


def test_what_is_stored_says_that_texts_were_templated(process, tmp_path):
    config, plain = TrainConfig(model="toy", data="toy", cache_dir=str(tmp_path)), open_model("toy", process)
    models = plain, replace(plain, templated=True)
    attention = [describe_extraction(config, model, [1], "data", process.device) for model in models]
    scores = [Scoring(config, model, "data", None, process) for model in models]
    for plain_meta, meta in (attention, [each.meta for each in scores]):
        assert meta == plain_meta | {"templated": True} and "templated" not in plain_meta
    assert scores[0].folder != scores[1].folder
