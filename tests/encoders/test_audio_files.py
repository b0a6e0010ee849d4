"""Sound files of every kind decode to the samples they were made from; bad ones fail with their cause."""

from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from raw_media import SOUNDS, sound

from mocme_dist.encoders import audio_files
from mocme_dist.encoders.audio_files import decode_audio, resample
from mocme_dist.encoders.encoder import BadFile
from mocme_dist.errors import ConfigError


def cause_of(content: bytes, max_seconds: float = 60.0) -> str:
    with pytest.raises(BadFile) as caught:
        decode_audio(content, 16_000, 30.0, max_seconds)
    assert "0x" not in str(caught.value), "an address in memory would make reports differ"
    return caught.value.cause


def sine(hertz: float, rate: int, seconds: float) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("kind, rate", [(kind, 48_000 if kind == "opus" else 44_100) for kind in SOUNDS])
def test_every_kind_is_heard_at_the_rate_asked_for(kind, rate):
    samples = decode_audio(sound(kind, 440.0, rate), 16_000, 30.0, 60.0)
    assert samples.shape == (16_000,) and samples.dtype == np.float32
    middle = slice(2000, 14_000)  # lossy coders need time to settle
    power = np.abs(np.fft.rfft(samples[middle] * np.hanning(12_000)))
    assert abs(power.argmax() * 16_000 / 12_000 - 440) < 2
    assert np.sqrt((samples[middle] ** 2).mean()) == pytest.approx(0.5 / np.sqrt(2), rel=0.03)


def test_channels_are_averaged_and_only_the_first_seconds_are_decoded(monkeypatch):
    monkeypatch.setattr(audio_files, "_BLOCK", 4096)  # several blocks, the last one shorter
    mono, stereo = (decode_audio(sound("wav", channels=channels), 16_000, 30.0, 60.0) for channels in (1, 2))
    assert np.allclose(stereo, mono / 2, atol=1e-4)
    first = decode_audio(sound("wav"), 16_000, 0.25, 60.0)
    assert np.array_equal(first, mono[:4000])


@pytest.mark.parametrize(
    "rate, wanted", [(48_000, 16_000), (44_100, 16_000), (8_000, 16_000), (22_050, 16_000), (11_027, 16_000)]
)
def test_resampling_gives_the_same_sine_at_the_other_rate(rate, wanted):
    found = resample(sine(700.0, rate, 0.5), rate, wanted)
    expected = sine(700.0, wanted, 0.5)
    assert len(found) == -(-round(rate * 0.5) * wanted // rate)
    middle = slice(wanted // 20, -wanted // 20)  # a sine that begins at once has all frequencies: ripples at the ends
    assert np.abs(found[: len(expected)][middle] - expected[middle]).max() < 0.01
    assert resample(sine(700.0, wanted, 0.5), wanted, wanted) is not None


def test_what_the_lower_rate_cannot_hold_is_gone():
    loud = resample(sine(15_000.0, 44_100, 0.5), 44_100, 16_000)
    assert np.abs(loud[800:-800]).max() < 0.01


@pytest.mark.parametrize("kind", SOUNDS)
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_cut_file_is_refused_whatever_its_kind(kind, share):
    content = sound(kind)
    # FLAC's decoder meets the end in the middle of a frame and can only call it lost
    assert cause_of(content[: int(len(content) * share)]) == ("undecodable" if kind == "flac" else "truncated")


def test_the_length_that_an_mp3_tells_is_read_from_its_first_frame_only():
    whole = sound("mp3")
    place = max(whole.find(b"Xing"), whole.find(b"Info"))
    assert 0 < place <= 36
    for length in range(place + 4, place + 16):
        assert cause_of(whole[:length]) == "truncated"
    text = b"\0\0\0Info\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"  # would tell of 4 GB
    body = b"TIT2" + len(text).to_bytes(4, "big") + b"\0\0" + text
    tagged = b"ID3\x03\0\0" + len(body).to_bytes(4, "big") + body + whole
    assert np.array_equal(decode_audio(tagged, 16_000, 30.0, 60.0), decode_audio(whole, 16_000, 30.0, 60.0))
    assert cause_of(tagged[:-100]) == "truncated"


def test_bad_files_fail_with_their_cause():
    assert cause_of(b"") == "empty file"
    assert cause_of(b"<html>404</html>") == "not audio"
    assert cause_of(bytes(500)) == "not audio"
    assert cause_of(b"ID3 garbage " * 50) == "undecodable"
    assert cause_of(b"fLaC" + bytes(range(256))) == "undecodable"
    assert cause_of(sound("wav", seconds=3.0), max_seconds=2.0) == "too long"
    silent = io.BytesIO()
    soundfile.write(silent, np.zeros((0, 1)), 16_000, format="WAV")
    assert cause_of(silent.getvalue()) == "no samples"
    slow = bytearray(sound("wav"))
    slow[24:28] = (7).to_bytes(4, "little")  # samples a second
    assert cause_of(bytes(slow)) == "odd sample rate"
    other = io.BytesIO()
    soundfile.write(other, np.zeros((10, 1)), 16_000, format="AIFF", subtype="PCM_16")
    assert cause_of(other.getvalue()) == "not audio"


def test_a_wrong_suffix_does_not_matter_the_content_does():
    # the decoder never sees the name
    assert len(decode_audio(sound("mp3"), 16_000, 30.0, 60.0)) > 0


def test_a_missing_package_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    with pytest.raises(ConfigError, match=r"modality audio: package soundfile .*pip install 'mocme-dist\[media\]'"):
        decode_audio(b"x", 16_000, 30.0, 60.0)
    monkeypatch.undo()
    monkeypatch.setattr(soundfile, "__libsndfile_version__", "1.0.31")
    with pytest.raises(ConfigError, match=r"libsndfile 1.0.31, expected 1.1 or newer"):
        decode_audio(b"x", 16_000, 30.0, 60.0)
