"""The packages EmojiNet is made of: versions, checksums, licences and authors.

Every package comes from the npm registry; the checksum is the registry's `integrity` (sha512), pinned here.
"""

from __future__ import annotations

from benchmarks.sources import Source

# Lists of short names in emojibase-data that icons are matched against, the most trusted first.
SHORTCODES = ("cldr", "github", "iamcal", "joypixels", "emojibase", "emojibase-legacy")

# Drawn emoji: the domains of the benchmark.
EMOJI_SETS = (
    Source(
        package="@iconify-json/noto",
        version="1.2.9",
        integrity="sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        license="Apache-2.0",
        author="Google Inc",
        url="https://github.com/googlefonts/noto-emoji",
        look="colour",
        members=("icons.json", "chars.json"),
    ),
    Source(
        package="@iconify-json/noto-v1",
        version="1.2.5",
        integrity="sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        license="Apache-2.0",
        author="Google Inc",
        url="https://github.com/googlefonts/noto-emoji",
        look="colour",
    ),
    Source(
        package="@iconify-json/twemoji",
        version="1.2.5",
        integrity="sha512-uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        license="CC-BY-4.0",
        author="Twitter",
        url="https://github.com/jdecked/twemoji",
        look="flat colour",
        members=("icons.json", "chars.json"),
    ),
    Source(
        package="@iconify-json/openmoji",
        version="1.2.29",
        integrity="sha512-vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        license="CC-BY-SA-4.0",
        author="OpenMoji",
        url="https://github.com/hfg-gmuend/openmoji",
        look="outlined colour",
        members=("icons.json", "chars.json"),
    ),
    Source(
        package="@iconify-json/fluent-emoji",
        version="1.2.7",
        integrity="sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        license="MIT",
        author="Microsoft Corporation",
        url="https://github.com/microsoft/fluentui-emoji",
        look="gradients",
    ),
    Source(
        package="@iconify-json/fluent-emoji-flat",
        version="1.2.6",
        integrity="sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        license="MIT",
        author="Microsoft Corporation",
        url="https://github.com/microsoft/fluentui-emoji",
        look="flat colour",
        members=("icons.json", "chars.json"),
    ),
    Source(
        package="@iconify-json/fluent-emoji-high-contrast",
        version="1.2.6",
        integrity="sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        license="MIT",
        author="Microsoft Corporation",
        url="https://github.com/microsoft/fluentui-emoji",
        look="monochrome",
        members=("icons.json", "chars.json"),
    ),
    Source(
        package="@iconify-json/emojione",
        version="1.2.3",
        integrity="sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        license="CC-BY-4.0",
        author="Emoji One",
        url="https://github.com/EmojiTwo/emojitwo",
        look="flat colour",
    ),
    Source(
        package="@iconify-json/emojione-monotone",
        version="1.2.1",
        integrity="sha512-cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
        license="CC-BY-4.0",
        author="Emoji One",
        url="https://github.com/EmojiTwo/emojitwo",
        look="monochrome",
    ),
    Source(
        package="@iconify-json/emojione-v1",
        version="1.2.3",
        integrity="sha512-UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        license="CC-BY-SA-4.0",
        author="Emoji One",
        url="https://github.com/joypixels/emojione-legacy",
        look="colour",
    ),
    Source(
        package="@iconify-json/fxemoji",
        version="1.2.2",
        integrity="sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        license="Apache-2.0",
        author="Mozilla",
        url="https://github.com/mozilla/fxemoji",
        look="flat colour",
    ),
)

# Names, groups and keywords of the concepts.
NAMES = (
    Source(
        package="emojibase-data",
        version="17.0.0",
        integrity="sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        license="MIT",
        author="Miles Johnson",
        url="https://github.com/milesj/emojibase",
        members=(
            "en/data.json",
            "meta/groups.json",
            *(f"en/shortcodes/{name}.json" for name in SHORTCODES),
        ),
    ),
    Source(
        package="emojilib",
        version="4.0.3",
        integrity="sha512-KbWiYre9aRSaPbHrHZIz9zmoM+21LAsK1VFJtnTh1VCtWE/rNMDviGhQTmselFl95dhqtGlY22iH0leG5BuW0g==",
        license="MIT",
        author="Mu-An Chiou",
        url="https://github.com/muan/emojilib",
        members=("dist/emoji-en-US.json",),
    ),
)

# Icons that have little to do with the task: they fill up the pool that pairs are retrieved from.
UNRELATED_SETS = (
    Source(
        package="@iconify-json/tabler",
        version="1.2.41",
        integrity="sha512-GHg+H/cnr0anaCoV383JONiOMxZQOdojWYNLgL3x0fRE07YW7c+AHiYmIhXet//oq26T830qitdP7l43ojiCXw==",
        license="MIT",
        author="Paweł Kuna",
        url="https://github.com/tabler/tabler-icons",
    ),
    Source(
        package="@iconify-json/game-icons",
        version="1.2.4",
        integrity="sha512-/HDDZxowXgDJcOEwPspUCq5RuDdl25OyZKdtxqqiPJQNTrWIym7r4StLzIVs77DyNzOWWhH5wDqwYR3WHeDfkg==",
        license="CC-BY-3.0",
        author="GameIcons",
        url="https://github.com/game-icons/icons",
    ),
    Source(
        package="@iconify-json/healthicons",
        version="1.2.13",
        integrity="sha512-1c6nzjXoYBHwFqckX4Jb0PIReOzm3FZ4hWHNz/YYw1yL7QRBTeolh+S4kWpjWVa8hn9oJjgdFv0fyd8ERcRiEA==",
        license="MIT",
        author="Resolve to Save Lives",
        url="https://github.com/resolvetosavelives/healthicons",
    ),
    Source(
        package="@iconify-json/logos",
        version="1.2.19",
        integrity="sha512-ICjDNu2RW4xMk+0YAHyrTj/pW2BHgywcYyvf9DS16upalmSUbg+WqkEYJRim8iVOuVylyo9FFjzWLzACFhj8oA==",
        license="CC0-1.0",
        author="Gil Barbara",
        url="https://github.com/gilbarbara/logos",
    ),
    Source(
        package="@iconify-json/vscode-icons",
        version="1.2.97",
        integrity="sha512-nkqeEluYLK3JGXQqmQKHJHdrHYL/r09yz1RZLRl0qDoBdIlW2JQmTRDxc86lzwcmfIyTXib8CBDWEsBj5xVfWQ==",
        license="MIT",
        author="Roberto Huertas",
        url="https://github.com/vscode-icons/vscode-icons",
    ),
    Source(
        package="@iconify-json/devicon",
        version="1.2.68",
        integrity="sha512-4RNlCSNCSgDEOVMHkBOxgik9agJcVRcfXwAZcwMdIolWx/lvXHzo2kqcqTqQGviZuBbnv3L1lyd+CowyZE+I3g==",
        license="MIT",
        author="konpa",
        url="https://github.com/devicons/devicon/tree/master",
    ),
    Source(
        package="@iconify-json/circle-flags",
        version="1.2.11",
        integrity="sha512-vrx2btOkTQ4/P75ElEDnjXShmNTwInXuhhpIQQ6U6YUTdxfWyvm/4ijNG8FX8iWFr+sqqQRCvXpm2RfRtjVXfg==",
        license="MIT",
        author="HatScripts",
        url="https://github.com/HatScripts/circle-flags",
    ),
    Source(
        package="@iconify-json/flat-color-icons",
        version="1.2.3",
        integrity="sha512-KcmJ7CY0TKFv5GuBjiS4/v++jEcNXna1jfY+yq014tnw/MN/jMI2oYpoMHGuIpYtUqDu7eove+WySnOYO8nS3w==",
        license="MIT",
        author="Icons8",
        url="https://github.com/icons8/flat-Color-icons",
    ),
)

ALL_SOURCES = (*EMOJI_SETS, *NAMES, *UNRELATED_SETS)
