"""Numbers as readers see them."""

import pytest

from openling.report.text import bytes_text, count_text, device_text, gap_text, perplexity_text, seconds_text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count_text(0), "0"),
        (count_text(999), "999"),
        (count_text(999_600), "1M"),
        (count_text(134_515_008), "135M"),
        (count_text(1.012e12), "1.01T"),
        (count_text(65536, 1024), "64K"),
        (bytes_text(0), "0 B"),
        (bytes_text(11_520), "11.25 KiB"),
        (bytes_text(3_686_400), "3.516 MiB"),
        (seconds_text(119.94), "119.9 s"),
        (seconds_text(412.3), "6 min 52 s"),
        (seconds_text(7260), "2 h 1 min"),
        (perplexity_text(10.074), "10.07"),
        (perplexity_text(73130.4), "73,130"),
        (perplexity_text(1.2e7), "1.20e+07"),
        (gap_text(2.29), "+2.290"),
        (gap_text(-0.01), "-0.010"),
        (device_text("AMD EPYC, 2 cores, 24 GiB"), "AMD EPYC, 2 cores"),
        (device_text("A CPU, 16 cores, 128 GiB, NVIDIA H100"), "one NVIDIA H100"),
        (device_text("A CPU, 16 cores, 128 GiB, NVIDIA H100, NVIDIA H100"), "2 x NVIDIA H100"),
    ],
)
def test_numbers(shown, expected):
    assert shown == expected
