"""Times of cron texts, and the dates in the templates of schedules."""

from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice, pairwise
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchserve.cron import meaning_of, next_after, require_cron, times_after, zone_of
from batchserve.errors import InvalidOptions
from batchserve.schedules.templates import Moment, filled

ZURICH = ZoneInfo("Europe/Zurich")
DAY = 86400.0


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def shown(times: list[float], zone: ZoneInfo = ZURICH) -> list[str]:
    return [datetime.fromtimestamp(time, zone).isoformat() for time in times]


def times(cron: str, after: str, count: int, zone: ZoneInfo = ZURICH) -> list[str]:
    return shown(list(islice(times_after(cron, zone, at(after)), count)), zone)


# --- what a cron text may be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("0 0 2 * * *", "expected five fields (minute, hour, day of month, month, day of week), got six"),
        ("0 0 2 * * *", "no field for seconds"),
        ("* * * * * * *", "got seven"),
        ("@daily", "`@daily` is written `0 0 * * *`"),
        ("0 2 * *", "got four"),
        ("", "got none"),
        ("60 * * * *", "the minute cannot be '60'"),
        ("0 24 * * *", "the hour cannot be '24'"),
        ("0 0 32 * *", "the day of month cannot be '32'"),
        ("0 0 30 2 *", "the day of month cannot be '30'"),
        ("0 0 * 13 *", "the month cannot be '13'"),
        ("0 0 * * 8", "the day of week cannot be '8'"),
        ("*/0 * * * *", "the minute cannot be '*/0'"),
        ("a b c d e", "the minute cannot be 'a'"),
        ("5-1 * * * *", "the minute cannot be '5-1'"),
        ("\u00b2 * * * *", "the minute cannot be"),
    ],
)
def test_a_text_that_is_no_cron_text_is_refused_with_its_field(text: str, told: str) -> None:
    with pytest.raises(InvalidOptions) as refused:
        require_cron(text)
    assert told in refused.value.detail


def test_blanks_between_fields_are_one_space() -> None:
    assert require_cron("  0\t2  * * *  ") == "0 2 * * *"


def test_a_cron_text_has_a_meaning() -> None:
    assert meaning_of("0 2 * * *") == "At 02:00 every day"


@pytest.mark.parametrize("name", ["Europe/Zuerich", "", "../etc/passwd", "Europe", "UTC\0", "/etc/localtime", "x" * 64])
def test_an_unknown_time_zone_is_refused(name: str) -> None:
    with pytest.raises(InvalidOptions, match="time_zone: expected a name such as Europe/Zurich"):
        zone_of(name)


def test_a_misspelt_time_zone_is_told_the_close_ones() -> None:
    with pytest.raises(InvalidOptions, match=r"close: .*Europe/Zurich"):
        zone_of("Europe/Zuerich")


# --- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cron", "expected"),
    [
        ("0 2 * * *", ["2026-11-30T02:00:00+01:00", "2026-12-01T02:00:00+01:00"]),
        ("*/20 2 * * *", ["2026-11-30T02:00:00+01:00", "2026-11-30T02:20:00+01:00"]),
        ("0 2 1 * MON", ["2026-11-30T02:00:00+01:00", "2026-12-01T02:00:00+01:00"]),
        ("0 2 * * MON#1", ["2026-12-07T02:00:00+01:00", "2027-01-04T02:00:00+01:00"]),
        ("0 2 L * *", ["2026-11-30T02:00:00+01:00", "2026-12-31T02:00:00+01:00"]),
        ("0 2 29 2 *", ["2028-02-29T02:00:00+01:00", "2032-02-29T02:00:00+01:00"]),
    ],
)
def test_the_times_of_a_cron_text_come_in_order(cron: str, expected: list[str]) -> None:
    assert times(cron, "2026-11-29T12:00:00+01:00", 2) == expected


def test_a_time_is_after_the_moment_and_never_that_itself() -> None:
    assert times("0 2 * * *", "2026-11-30T02:00:00+01:00", 1) == ["2026-12-01T02:00:00+01:00"]
    assert times("0 2 * * *", "2026-11-30T01:59:59.999+01:00", 1) == ["2026-11-30T02:00:00+01:00"]


def test_a_skipped_time_of_the_day_runs_once_at_the_end_of_the_gap() -> None:
    """On 29 March 2026 Zurich goes from 02:00 to 03:00."""
    assert times("30 2 * * *", "2026-03-28T12:00:00+01:00", 3) == [
        "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:30:00+02:00",
        "2026-03-31T02:30:00+02:00",
    ]


def test_a_repeated_time_of_the_day_runs_once_the_first_time() -> None:
    """On 25 October 2026 Zurich goes from 03:00 back to 02:00."""
    assert times("30 2 * * *", "2026-10-24T12:00:00+02:00", 3) == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-26T02:30:00+01:00",
        "2026-10-27T02:30:00+01:00",
    ]


@pytest.mark.parametrize("moment", ["2026-10-25T02:10:00+01:00", "2026-10-25T02:50:00+01:00"])
def test_from_within_a_repeated_hour_the_next_time_is_not_in_the_past(moment: str) -> None:
    assert times("30 2 * * *", moment, 1) == ["2026-10-26T02:30:00+01:00"]


def test_an_interval_runs_by_elapsed_time_on_both_days() -> None:
    spring = list(islice(times_after("*/30 * * * *", ZURICH, at("2026-03-29T00:00:00+01:00")), 8))
    autumn = list(islice(times_after("30 * * * *", ZURICH, at("2026-10-25T01:00:00+02:00")), 4))
    assert {later - earlier for earlier, later in pairwise(spring)} == {1800.0}
    assert {later - earlier for earlier, later in pairwise(autumn)} == {3600.0}
    assert shown(autumn) == [
        "2026-10-25T01:30:00+02:00",
        "2026-10-25T02:30:00+02:00",
        "2026-10-25T02:30:00+01:00",
        "2026-10-25T03:30:00+01:00",
    ]


@pytest.mark.parametrize("cron", ["30 * * * *", "*/10 */2 * * *", "* 20 * * *", "*/15 */3 * * *", "5 * * * SUN"])
@pytest.mark.parametrize(
    ("zone", "changes"),
    [
        ("Australia/Lord_Howe", ["2026-10-03T15:30:00Z", "2027-04-03T15:00:00Z"]),  # by half an hour
        ("Pacific/Chatham", ["2026-09-26T14:00:00Z", "2027-04-03T14:00:00Z"]),  # at 02:45 and 03:45
        ("Europe/Zurich", ["2026-03-29T01:00:00Z", "2026-10-25T01:00:00Z"]),
        ("America/Havana", ["2026-03-08T05:00:00Z", "2026-11-01T05:00:00Z"]),  # at midnight
        ("Antarctica/Troll", ["2026-03-29T01:00:00Z", "2026-10-25T01:00:00Z"]),  # by two hours
        ("Asia/Kathmandu", ["2026-03-29T01:00:00Z"]),  # none
    ],
)
def test_an_interval_has_each_minute_whose_local_time_is_one_of_the_text(
    cron: str, zone: str, changes: list[str]
) -> None:
    place = ZoneInfo(zone)
    minutes, hours, _, _, weekday = cron.split()

    def fits(field: str, number: int) -> bool:
        begin, _, step = field.partition("/")
        return number % int(step or 1) == 0 if begin == "*" else number == int(field)

    for change in changes:
        begin, end = int(at(change)) - 40_020, int(at(change)) + 90_000
        local = [(time, datetime.fromtimestamp(time, place)) for time in range(begin, end, 60)]
        expected = [
            time
            for time, there in local
            if fits(minutes, there.minute) and fits(hours, there.hour) and (weekday == "*" or there.weekday() == 6)
        ]
        for after in (begin - 1, int(at(change)) - 5400, int(at(change)) - 1, int(at(change))):
            found = [time for time in islice(times_after(cron, place, after), 200) if time < end]
            assert found == [time for time in expected if time > after]


@pytest.mark.parametrize("zone", ["Europe/Zurich", "America/New_York", "Australia/Lord_Howe", "America/Havana", "UTC"])
@pytest.mark.parametrize("cron", ["30 2 * * *", "0 0 * * *", "15 1 * * *"])
def test_a_daily_schedule_has_one_time_on_each_day_of_a_year(zone: str, cron: str) -> None:
    place = ZoneInfo(zone)
    found = list(islice(times_after(cron, place, datetime(2026, 1, 1, tzinfo=place).timestamp() - 1), 365))
    assert len({datetime.fromtimestamp(time, place).date() for time in found}) == 365
    assert found[-1] < datetime(2027, 1, 1, tzinfo=place).timestamp()


@pytest.mark.parametrize("zone", ["Europe/Zurich", "America/New_York", "America/Havana"])
def test_an_hourly_schedule_has_a_time_in_each_hour_of_a_year(zone: str) -> None:
    place = ZoneInfo(zone)
    found = list(islice(times_after("0 * * * *", place, datetime(2026, 1, 1, tzinfo=place).timestamp() - 1), 365 * 24))
    assert {later - earlier for earlier, later in pairwise(found)} == {3600.0}


@given(
    st.sampled_from(["30 2 * * *", "*/7 * * * *", "0,30 1-4 * * *", "15 * * * SUN", "0 2 L * *"]),
    st.sampled_from(["Europe/Zurich", "America/Havana", "Australia/Lord_Howe", "Asia/Kathmandu"]),
    st.floats(min_value=at("2026-01-01T00:00:00Z"), max_value=at("2027-01-01T00:00:00Z")),
)
@example("*/7 * * * *", "Europe/Zurich", at("2026-12-31T23:00:00Z") - 2e-7)
def test_times_go_on_from_any_moment_as_from_any_earlier_one(cron: str, zone: str, moment: float) -> None:
    place = ZoneInfo(zone)
    following = next_after(cron, place, moment)
    assert following is not None
    assert following > moment
    assert next(time for time in times_after(cron, place, moment - 3 * DAY) if time > moment) == following


# --- templates -------------------------------------------------------------------------------------------------------


def written(text: str, moment: str = "2026-03-31T02:00:00+02:00", zone: ZoneInfo = ZURICH) -> Any:
    return filled({"text": text}, Moment(at(moment), zone, "nightly"))["text"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{date}", "2026-03-31"),
        ("s3://lake/{date-1d}/*.parquet", "s3://lake/2026-03-30/*.parquet"),
        ("{date:%Y/%m/%d}", "2026/03/31"),
        ("{date-1mo}", "2026-02-28"),
        ("{date-1mo:%Y%m}", "202602"),
        ("{date+1y-1d}", "2027-03-30"),
        ("{date-2w}", "2026-03-17"),
        ("{date-1d+6h:%Y%m%dT%H}", "20260330T08"),
        ("{time}", "0200"),
        ("{time-3h:%H:%M}", "23:00"),
        ("{schedule}-{date:%j}", "nightly-090"),
        ("{date:%G-W%V-%u} %%", "2026-W14-2 %%"),
        ("{{date}}", "{date}"),
        ("{{{date}}}", "{2026-03-31}"),
        ("no placeholder", "no placeholder"),
    ],
)
def test_a_placeholder_stands_for_the_time_of_its_tick(text: str, expected: str) -> None:
    assert written(text) == expected


def test_dates_are_those_of_the_time_zone_of_the_schedule() -> None:
    moment = "2026-11-30T23:30:00Z"
    assert written("{date} {time}", moment) == "2026-12-01 0030"
    assert written("{date} {time}", moment, ZoneInfo("UTC")) == "2026-11-30 2330"


def test_a_day_is_one_of_the_calendar_and_an_hour_one_of_the_clock_where_clocks_are_set() -> None:
    assert written("{date-1d:%Y-%m-%d %H:%M}", "2026-03-29T12:00:00+02:00") == "2026-03-28 12:00"
    assert written("{date-24h:%Y-%m-%d %H:%M}", "2026-03-29T12:00:00+02:00") == "2026-03-28 11:00"
    assert written("{date-1d:%Y-%m-%d %H:%M}", "2026-10-25T12:00:00+01:00") == "2026-10-24 12:00"
    assert written("{date-24h:%Y-%m-%d %H:%M}", "2026-10-25T12:00:00+01:00") == "2026-10-24 13:00"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{dat}", "there is no placeholder '{dat}'; expected {date}, {time} or {schedule}"),
        ("{}", "there is no placeholder '{}'"),
        ("{date-1}", "there is no placeholder '{date-1}'"),
        ("{date-1x}", "there is no placeholder '{date-1x}'"),
        ("{ date }", "there is no placeholder"),
        ("{stem}", "there is no placeholder '{stem}'"),
        ("{date:%B}", "there is no directive '%B'"),
        ("{date:%-d}", "there is no directive '%-'"),
        ("{date:%}", "there is no directive '%'"),
        ("{date-9999y}", "leads out of the calendar"),
        ("{date+99999mo}", "leads out of the calendar"),
        ("{schedule-1d}", "a name has no offset and no format"),
        ("a { b", "'{' is alone; a brace itself is written '{{'"),
        ("{date}}", "'}' is alone"),
    ],
)
def test_an_unknown_placeholder_is_refused_with_its_place(text: str, told: str) -> None:
    request = {"input": {"urls": ["s3://lake/a.csv", text]}}
    with pytest.raises(InvalidOptions) as refused:
        filled(request, Moment(at("2026-03-31T02:00:00Z"), ZURICH, "nightly"))
    assert told in refused.value.detail
    assert refused.value.detail.startswith("request.input.urls.1: ")
    assert refused.value.errors[0]["parameter"] == "request.input.urls.1"


def test_texts_are_filled_at_any_depth_and_other_values_stay() -> None:
    request = {
        "input": {"urls": ["{date}"]},
        "metadata": {"night of {date}": "{date-1d}"},
        "priority": 3,
        "reuse": False,
        "max_errors": None,
    }
    assert filled(request, Moment(at("2026-03-31T02:00:00Z"), ZURICH, "nightly")) == {
        "input": {"urls": ["2026-03-31"]},
        "metadata": {"night of {date}": "2026-03-30"},
        "priority": 3,
        "reuse": False,
        "max_errors": None,
    }


def test_the_names_of_results_are_left_to_their_job() -> None:
    request = {"output": {"url": "s3://lake/{date}/{stem}.parquet"}}
    found = filled(request, Moment(at("2026-03-31T02:00:00Z"), ZURICH, "nightly"))
    assert found == {"output": {"url": "s3://lake/2026-03-31/{stem}.parquet"}}


def test_a_request_of_too_many_levels_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(InvalidOptions, match="at most 16 levels"):
        filled(deep, Moment(0.0, ZURICH, "nightly"))


@given(st.text(alphabet="{}date-+1dwmoy:%Y \x00\ud800", max_size=20))
def test_any_text_is_filled_or_refused(text: str) -> None:
    with suppress(InvalidOptions):
        assert isinstance(written(text), str)


def test_every_time_is_in_the_past_or_the_future_of_utc_alike() -> None:
    """A schedule in UTC has no special day."""
    found = list(islice(times_after("30 2 * * *", ZoneInfo("UTC"), datetime(2026, 1, 1, tzinfo=UTC).timestamp()), 365))
    assert {later - earlier for earlier, later in pairwise(found)} == {DAY}
