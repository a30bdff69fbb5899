"""The folder of releases: what is published to whom, what is taken back, and what devices run."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.protocol.release import Running
from server_hub.gateway.releases import DATABASE, Releases
from tests.lib.commands import output, refusal
from tests.lib.releases import trained_bundles

DEVICES = [f"phone-{n}" for n in range(2000)]


@pytest.fixture(scope="module")
def made(bundles: BundleIndex, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Bundles of three trained models."""
    folder = tmp_path_factory.mktemp("trained")
    return [trained_bundles(folder / str(n), bundles, n)[0] for n in range(3)]


@pytest.fixture
def releases(tmp_path: Path) -> Releases:
    """A folder without a release."""
    return Releases(tmp_path / "releases", create=True)


def number_for(releases: Releases, device: str, tier: str = "small") -> int | None:
    found = releases.newest(device, tier)
    return None if found is None else found.number


def test_devices_get_the_newest_release_of_their_tier(releases: Releases, made: list[Path]) -> None:
    assert releases.tiers() == []
    assert number_for(releases, "ada") is None
    for number, folder in enumerate(made, 1):
        assert releases.publish(folder).number == number
        found = releases.newest("ada", "small")
        assert found is not None
        index = BundleIndex.read(folder)
        assert (found.number, found.manifest) == (number, index.tiers["small"].manifest)
        for name in (found.manifest, *index.manifest("small").blobs):
            assert releases.blobs.read(name) == index.blobs().read(name)
    assert releases.newest("ada", "huge") is None
    assert sorted(releases.tiers()) == ["large", "medium", "small"]


def test_a_share_is_that_share_of_the_devices_and_grows(
    releases: Releases, made: list[Path]
) -> None:
    """Who gets a release goes on getting it when the share grows; others are first next time."""
    releases.publish(made[0])
    releases.publish(made[1], 0.1)

    def first() -> set[str]:
        newest = releases.published()[-1].number
        return {device for device in DEVICES if number_for(releases, device) == newest}

    groups = [first()]
    for share in (0.3, 0.7, 1.0):
        releases.set_share(2, share)
        groups.append(first())
    for group, share in zip(groups, (0.1, 0.3, 0.7, 1.0), strict=True):
        spread = 4 * (share * (1 - share) / len(DEVICES)) ** 0.5
        assert len(group) / len(DEVICES) == pytest.approx(share, abs=spread + 1e-9)
    assert groups[0] < groups[1] < groups[2] < groups[3] == set(DEVICES)
    releases.publish(made[2], 0.1)
    overlap = len(first() & groups[0]) / len(DEVICES)
    assert overlap < 0.03, "0.01 of the devices are in both groups by chance"


@given(device=st.text(), shares=st.lists(st.floats(0.001, 1.0), min_size=2, max_size=2))
def test_a_larger_share_includes_a_smaller_one(
    device: str, shares: list[float], shared_releases: Releases
) -> None:
    got = []
    for share in sorted(shares):
        shared_releases.set_share(1, share)
        got.append(number_for(shared_releases, device) == 1)
    assert got[0] <= got[1]
    shared_releases.set_share(1, 1.0)
    assert number_for(shared_releases, device) == 1


@pytest.fixture(scope="module")
def shared_releases(made: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Releases:
    found = Releases(tmp_path_factory.mktemp("one") / "releases", create=True)
    found.publish(made[0])
    return found


def test_a_release_that_is_taken_back_gives_way_to_the_one_before(
    releases: Releases, made: list[Path]
) -> None:
    """Another process sees it at once."""
    other = Releases(releases.folder)
    releases.publish(made[0])
    releases.publish(made[1])
    assert number_for(other, "ada") == 2
    other.withdraw(2)
    assert number_for(releases, "ada") == 1
    releases.withdraw(1)
    assert number_for(other, "ada") is None
    assert other.tiers() == []
    releases.set_share(2, 1.0)
    assert number_for(other, "ada") == 2
    assert [r.share for r in other.published()] == [0.0, 1.0]


def test_what_devices_say_is_counted(releases: Releases, made: list[Path]) -> None:
    first, second = (releases.publish(folder).tiers["small"] for folder in made[:2])
    releases.note("ada", "small", Running(second))
    releases.note("bo", "small", Running(first, second, "it answers differently"))
    releases.note("cy", "small", Running(None, second))
    releases.note("dee", "small", Running("0" * 64))
    old, new = Releases(releases.folder).published()
    assert (old.devices, old.refused) == (1, {})
    assert (new.devices, new.refused) == (1, {"bo": "it answers differently", "cy": ""})
    releases.note("bo", "small", Running(second))  # it has been mended
    old, new = releases.published()
    assert (old.devices, new.devices, new.refused) == (0, 2, {"cy": ""})


# --- what is refused ----------------------------------------------------------------------------


def test_what_devices_cannot_check_is_not_published(
    releases: Releases, bundles: BundleIndex, made: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"has no sample.*cutlayer model export RUN"):
        releases.publish(bundles.folder)
    with pytest.raises(BundleError, match="no bundles in"):
        releases.publish(tmp_path / "nothing")
    for share in (0.0, -0.1, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="must be above 0 and at most 1"):
            releases.publish(made[0], share)
    assert releases.published() == []
    releases.publish(made[0])
    with pytest.raises(ConfigError, match="is release 1 already"):
        releases.publish(made[0], 0.5)
    assert [release.share for release in releases.published()] == [1.0]


def test_a_damaged_bundle_is_not_published(
    releases: Releases, bundles: BundleIndex, tmp_path: Path
) -> None:
    folder, _ = trained_bundles(tmp_path / "trained", bundles, 5)
    index = BundleIndex.read(folder)
    victim = folder / "blobs" / index.manifest("large").initial_state
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(BundleError, match="changed or damaged"):
        releases.publish(folder)
    victim.unlink()
    with pytest.raises(BundleError, match="missing from"):
        releases.publish(folder)
    assert releases.published() == []


def test_mistakes_are_one_sentence(
    made: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "releases")
    for arguments in (["list"], ["withdraw", "1"], ["share", "1", "0.5"], ["serve"]):
        line = refusal(capsys, "release", *arguments, "--releases", folder)
        assert f"there are no releases in {folder}; publish one with: cutlayer release" in line
    assert not Path(folder).exists()
    output(capsys, "release", "publish", str(made[0]), "--releases", folder)
    line = refusal(capsys, "release", "withdraw", "7", "--releases", folder)
    assert "there is no release 7" in line
    assert "there are 1" in line
    line = refusal(capsys, "release", "share", "1", "0", "--releases", folder)
    assert "cutlayer release withdraw takes a release back" in line
    line = refusal(
        capsys, "release", "serve", "--releases", folder, "--tokens", str(tmp_path / "t.toml")
    )
    assert "cutlayer token new" in line


@pytest.mark.parametrize("change", ["newer", "no database"])
def test_a_database_that_cannot_be_used(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / DATABASE
    if change == "newer":
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA user_version = 99")
            database.commit()
        expected = "a newer version of Cutlayer"
    else:
        path.write_bytes(b"no database at all, and long enough to be taken for one" * 99)
        expected = "cannot be used"
    before = path.read_bytes()
    assert expected in refusal(capsys, "release", "list", "--releases", str(tmp_path))
    if change != "newer":
        assert path.read_bytes() == before


def test_the_commands_say_what_they_have_done(
    made: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--releases", str(tmp_path / "releases")]
    said = output(capsys, "release", "publish", str(made[0]), *folder)
    assert said == "release 1 is published to 100% of devices; tiers small, medium, large\n"
    said = output(capsys, "release", "publish", str(made[1]), *folder, "--share", "0.05", "--json")
    assert {"number": 2, "share": 0.05}.items() <= json.loads(said).items()
    assert output(capsys, "release", "share", "2", "0.125", *folder) == (
        "release 2 is for 12.5% of devices\n"
    )
    reason = "the logits [bold] differ"
    manifest = BundleIndex.read(made[1]).tiers["small"].manifest
    Releases(tmp_path / "releases").note("ada", "small", Running(None, manifest, reason))
    table = output(capsys, "release", "list", *folder)
    assert "12.5%" in table
    assert f"ada refuses release 2: {reason}" in table
    assert output(capsys, "release", "withdraw", "2", *folder) == "release 2 is taken back\n"
    assert "taken back" in output(capsys, "release", "list", *folder)
    listed = json.loads(output(capsys, "release", "list", *folder, "--json"))
    assert [release["share"] for release in listed] == [1.0, 0.0]
    assert listed[1]["refused"] == {"ada": reason}
