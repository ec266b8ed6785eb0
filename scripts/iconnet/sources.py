"""The icon sets IconNet is made of: versions, checksums, licences and authors.

Every package comes from the npm registry; the checksum is the registry's `integrity` (sha512), pinned here. The licence
is compared with the one in the package when IconNet is built. Sets that are not listed are kept for judging: add none.
"""

from __future__ import annotations

from benchmarks.sources import Source

MEMBERS = ("icons.json", "info.json", "metadata.json")

ICON_SETS = (
    Source(
        package="@iconify-json/tabler",
        version="1.2.41",
        integrity="sha512-GHg+H/cnr0anaCoV383JONiOMxZQOdojWYNLgL3x0fRE07YW7c+AHiYmIhXet//oq26T830qitdP7l43ojiCXw==",
        license="MIT",
        author="Paweł Kuna",
        url="https://github.com/tabler/tabler-icons",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/lucide",
        version="1.2.137",
        integrity="sha512-uKz1+tFbv1RFX/mJQNksdnyKJijNfRGSNnxfiyKtr+dLNfA3ERph+IgpXClKGOlV/5GsZwLv2jgJXQ/bjF/JAg==",
        license="ISC",
        author="Lucide Contributors",
        url="https://github.com/lucide-icons/lucide",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/ph",
        version="1.2.2",
        integrity="sha512-PgkEZNtqa8hBGjHXQa4pMwZa93hmfu8FUSjs/nv4oUU6yLsgv+gh9nu28Kqi8Fz9CCVu4hj1MZs9/60J57IzFw==",
        license="MIT",
        author="Phosphor Icons",
        url="https://github.com/phosphor-icons/core",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/carbon",
        version="1.2.29",
        integrity="sha512-whk3BOU2jXFtweigCrrrYXT7NzWXGUT1q268vEnySzhfdnwZhQhVlFjhkgZH86JRRx21/CziTmzpAJMe5V2yKQ==",
        license="Apache-2.0",
        author="IBM",
        url="https://github.com/carbon-design-system/carbon/tree/main/packages/icons",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/bi",
        version="1.2.7",
        integrity="sha512-IPz8WNxmLkH1I9msl+0Q4OnmjjvP4uU0Z61a4i4sqonB6vKSbMGUWuGn8/YuuszlReVj8rf+3gNv5JU8Xoljyg==",
        license="MIT",
        author="The Bootstrap Authors",
        url="https://github.com/twbs/icons",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/material-symbols",
        version="1.2.98",
        integrity="sha512-ycgn080/EGstyYcJFu+HN0TYI+ts/KFPb+An0dzpwZit4M/BoFO9U54BwBmrS2Qo/3g9NYV4Y/g1BT425tNgEw==",
        license="Apache-2.0",
        author="Google",
        url="https://github.com/google/material-design-icons",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/mdi",
        version="1.2.3",
        integrity="sha512-O3cLwbDOK7NNDf2ihaQOH5F9JglnulNDFV7WprU2dSoZu3h3cWH//h74uQAB87brHmvFVxIOkuBX2sZSzYhScg==",
        license="Apache-2.0",
        author="Pictogrammers",
        url="https://github.com/Templarian/MaterialDesign",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/fluent",
        version="1.2.60",
        integrity="sha512-+Tc4TcygQpzm2QNQ3v1/p5V+3OWczkJzKMqUw01pzGiIYLD85uhWPY4GaERkU0+J9J9ZqGQEWKSOk/qPL2ofsw==",
        license="MIT",
        author="Microsoft Corporation",
        url="https://github.com/microsoft/fluentui-system-icons",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/solar",
        version="1.2.13",
        integrity="sha512-/ZWb6xRib6pzxD/qTkKWYhuzSU2yu0bY+EN0spgtz1NM3d5f4eYueQZpL3PfCdsg5uVfm4Ldtt3cAyQL+YI8/Q==",
        license="CC-BY-4.0",
        author="480 Design",
        url="https://www.figma.com/community/file/1166831539721848736",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/bx",
        version="1.2.3",
        integrity="sha512-ihvX+2d688otgW7MAvUEdKVln+fZ28BJTlygazKUU/+RCODWT+2KObjAHe8+KPs4VhC8V6Tgoy1qrX0Myn/upA==",
        license="MIT",
        author="Boxicons",
        url="https://github.com/box-icons/boxicons",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/heroicons",
        version="1.2.3",
        integrity="sha512-n+vmCEgTesRsOpp5AB5ILB6srsgsYK+bieoQBNlafvoEhjVXLq8nIGN4B0v/s4DUfa0dOrjwE/cKJgIKdJXOEg==",
        license="MIT",
        author="Refactoring UI Inc",
        url="https://github.com/tailwindlabs/heroicons",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/iconoir",
        version="1.2.11",
        integrity="sha512-clBrCsZPkmdksYOkufVp7aoAU1j1hFQPrLUooWWmoYIMvKskUHQ+IDnwV7agTR+tGYHbud7OP2SRfYEpnqFDNw==",
        license="MIT",
        author="Luca Burgio",
        url="https://github.com/iconoir-icons/iconoir",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/ion",
        version="1.2.7",
        integrity="sha512-ZJNG5kLCbTPr68mdP0jx6Q3lB9AMEQKO2+VvIjuJ2llGFICBLD+cvESn/qGDRIqSfk2D3PrFMf/Qg8WKIUV7cg==",
        license="MIT",
        author="Ben Sperry",
        url="https://github.com/ionic-team/ionicons",
        members=MEMBERS,
    ),
    Source(
        package="@iconify-json/mingcute",
        version="1.2.8",
        integrity="sha512-J8VXpRwTpx5yzOzyhx3T4IXnfXIKTWFl3rZ9okcW4c+NMMuwkLvdmM4rkjB83tnYIhg5+kkeMpmw8tvSnxd4rQ==",
        license="Apache-2.0",
        author="MingCute Design",
        url="https://github.com/Richard9394/MingCute",
        members=MEMBERS,
    ),
)
