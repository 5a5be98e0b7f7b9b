"""Every figure against values worked out by hand."""

from __future__ import annotations

import math
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fisedit_compiler.errors import ConfigError, ModelNotFoundError
from fisedit_compiler.evaluation.measures.features import frechet_distance, load_extractor
from fisedit_compiler.evaluation.measures.judge import Judge, directional_similarity, layer_distance, similarity
from fisedit_compiler.evaluation.measures.pixels import EQUAL_DB, finite_psnr, outside_mask, ssim, with_base_inside
from fisedit_compiler.evaluation.measures.statistics import summarise
from fisedit_compiler.models import embedded_model_path, load_clip


def grey(value: int, size: int = 32) -> Image.Image:
    return Image.new("RGB", (size, size), (value, value, value))


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


EVERYWHERE = np.ones((32, 32), dtype=bool)
NOWHERE = ~EVERYWHERE


def test_directional_similarity_has_the_sign_of_the_change() -> None:
    base, before, after = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    assert directional_similarity(base, base + torch.tensor([0.5, 0.0]), before, after) == pytest.approx(1.0)
    assert directional_similarity(base, base - torch.tensor([0.5, 0.0]), before, after) == pytest.approx(-1.0)
    assert directional_similarity(base, base + torch.tensor([0.0, 3.0]), before, after) == pytest.approx(0.0)
    diagonal = directional_similarity(base, base + torch.tensor([1.0, 1.0]), before, after)
    assert diagonal == pytest.approx(math.sqrt(0.5))


def test_without_a_change_there_is_no_direction() -> None:
    base, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert directional_similarity(base, base, base, other) == 0.0
    assert directional_similarity(base, other, other, other) == 0.0


def test_psnr_counts_the_chosen_pixels_only() -> None:
    edited = np.asarray(grey(100)).copy()
    edited[:16] = 110
    edited[16:] = 200
    upper = np.zeros((32, 32), dtype=bool)
    upper[:16] = True
    assert finite_psnr(Image.fromarray(edited), grey(100), upper) == pytest.approx(20 * math.log10(255 / 10))
    assert finite_psnr(grey(100), grey(100), upper) == EQUAL_DB
    assert finite_psnr(grey(100), grey(100), NOWHERE) is None


def test_ssim_outside_sees_nothing_of_the_inside() -> None:
    base, edited = noise(0), np.asarray(noise(0)).copy()
    edited[8:24, 8:24] = 0
    outside = np.ones((32, 32), dtype=bool)
    outside[8:24, 8:24] = False
    assert ssim(Image.fromarray(edited), base, outside) == pytest.approx(1.0)
    assert ssim(Image.fromarray(edited), base, EVERYWHERE) < 0.9
    assert ssim(noise(1), base, outside) < 0.2
    assert ssim(base, base, NOWHERE) is None


def test_the_inside_is_the_bases() -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:8] = True
    outside = outside_mask(mask, grey(0))
    assert outside.sum() == 32 * 16 and not outside[:16].any()
    mixed = np.asarray(with_base_inside(grey(9), grey(5), outside))
    assert (mixed[:16] == 5).all() and (mixed[16:] == 9).all()


def test_layer_distance_by_hand() -> None:
    east, north = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert layer_distance([east, east], [east, east]) == 0.0
    assert layer_distance([east, east], [north, east]) == pytest.approx(1.0)
    assert layer_distance([torch.cat([east, east])], [torch.cat([north, -east])]) == pytest.approx(3.0)


def test_clip_finds_a_picture_like_itself_and_its_layers_equal(judge: Judge) -> None:
    first, again, other = judge.look(noise(0)), judge.look(noise(0)), judge.look(grey(200))
    assert similarity(first.embedding, again.embedding) == pytest.approx(1.0, abs=1e-5)
    assert similarity(first.embedding, other.embedding) < 0.99
    assert layer_distance(first.layers, again.layers) == pytest.approx(0.0, abs=1e-8)
    assert layer_distance(first.layers, other.layers) > 0.01
    assert len(first.layers) == 4 and first.layers[0].shape == (64, 192)


def test_the_judge_agrees_with_the_models_own_similarity(judge: Judge) -> None:
    caption = "a cat, red background"
    own = float(judge.clip.similarity([noise(0)], [caption])[0, 0])
    assert similarity(judge.look(noise(0)).embedding, judge.read(caption)) == pytest.approx(own, abs=1e-5)


def test_fid_of_equal_sets_is_nothing_and_of_shifted_ones_the_shift() -> None:
    features = list(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)))
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(features, [item + 2.0 for item in features]) == pytest.approx(6 * 4.0, rel=1e-4)
    assert frechet_distance(features[:1], features) is None


def test_an_extractor_from_a_file(tmp_path: Path) -> None:
    class MeanColour(torch.nn.Module):
        def forward(self, pixels: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            colour = pixels.float().mean(dim=(2, 3))
            return colour if return_features else colour[:, :1]

    torch.jit.script(MeanColour()).save(str(tmp_path / "mean.pt"))
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    assert load_extractor(tmp_path / "mean.pt")(picture).tolist() == [1.0, 2.0, 3.0]


class Marker:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_nothing_pickled_is_read(tmp_path: Path) -> None:
    """Archives of torch.export and files of torch.save, whatever their names."""
    ran = tmp_path / "ran"
    torch.save({"weight": Marker(ran)}, tmp_path / "saved.pt")
    torch.save({"weight": Marker(ran)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt2").write_bytes(pickle.dumps(Marker(ran)))
    with zipfile.ZipFile(tmp_path / "crafted.pt2", "w") as archive:
        archive.writestr("a/archive_format", "pt2")
        archive.writestr("a/data/sample_inputs/model.pt", (tmp_path / "saved.pt").read_bytes())
    shutil.copy(tmp_path / "crafted.pt2", tmp_path / "renamed.pt")
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "real.pt2")
    for name in ("saved.pt", "bare.pt2", "crafted.pt2", "renamed.pt", "real.pt2"):
        with pytest.raises(ConfigError, match=r"could run any code.*torch\.jit\.trace"):
            load_extractor(tmp_path / name)
    with pytest.raises(ModelNotFoundError, match="must be a TorchScript file"):
        load_extractor(tmp_path / "old.pt")
    assert not ran.exists()


def test_a_clip_directory_is_an_extractor(judge: Judge) -> None:
    extract = load_extractor(embedded_model_path("emoji-clip"))
    assert torch.allclose(extract(noise(0)), judge.look(noise(0)).features)


def test_wrong_extractors_and_clips_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    with pytest.raises(ModelNotFoundError, match=r"bad\.pt.*could not be loaded"):
        load_extractor(tmp_path / "bad.pt")
    with pytest.raises(ModelNotFoundError, match="there is no feature extractor"):
        load_extractor(tmp_path / "none.pt")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        load_clip(model=tmp_path)


def test_summaries() -> None:
    summary = summarise([1.0, None, 2.0, 6.0])
    assert summary is not None
    assert (summary.count, summary.mean, summary.median) == (3, 3.0, 2.0)
    assert (summary.smallest, summary.largest) == (1.0, 6.0)
    assert 1.0 <= summary.low < 3.0 < summary.high <= 6.0
    assert summarise([1.0, 2.0, 6.0]) == summary
    same = summarise([4.0, 4.0])
    assert same is not None and same.low == same.mean == same.high == 4.0
    assert summarise([None]) is None
