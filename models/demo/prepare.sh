#!/bin/sh
# Makes the training text of the demo model from Debian's King James Bible.
#
#   models/demo/prepare.sh            writes models/demo/data/{train,heldout}.txt
#   models/demo/prepare.sh DIR        writes DIR/{train,heldout}.txt
#
# Source: packages bible-kjv (the program that unpacks the text) and bible-kjv-text (the text), used if installed,
# otherwise downloaded with apt-get and unpacked into a temporary folder, which needs no root.
# Licence: the package's copyright file says that the copyright of the text, a translation of 1611, is expired: it is
# in the public domain. (In the United Kingdom alone, printing it is subject to letters patent of the Crown.)
#
# Form: plain ASCII. A chapter is a heading line ("Genesis 1") and its verses, one a line, without verse numbers; an
# empty line stands between chapters. Of the 1189 chapters every 40th, from the 20th on, is held out: 30 chapters, so
# that the held-out text comes from the whole book and none of its chapters was seen in training.
set -eu
export LC_ALL=C

out=${1:-$(dirname "$0")/data}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM

if command -v bible >/dev/null && [ -r /usr/lib/bible.data ]; then
    bible=bible
    data=/usr/lib
    for p in bible-kjv bible-kjv-text; do
        echo "installed package: $p $(dpkg-query -W -f '${Version}' "$p" 2>/dev/null || echo '(version unknown)')"
    done
else
    if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
        echo "prepare.sh: no 'bible' here and no apt-get to fetch it with; run this on Debian or Ubuntu" >&2
        exit 1
    fi
    (cd "$tmp" && apt-get -q download bible-kjv bible-kjv-text) || {
        echo "prepare.sh: download failed; if the package is unknown, run 'apt-get update' as root first" >&2
        exit 1
    }
    for deb in "$tmp"/*.deb; do
        echo "downloaded package: $(dpkg-deb -f "$deb" Package) $(dpkg-deb -f "$deb" Version)"
        dpkg -x "$deb" "$tmp/root"
    done
    bible=$tmp/root/usr/bin/bible
    data=$tmp/root/usr/lib
fi

# `-f` turns the page layout off: one verse a line, behind a reference such as "1Sm3:4 ".
"$bible" -p "$data" -f "Gen1:1-Rev22:21" >"$tmp/verses"

mkdir -p "$out"
awk -v train="$tmp/train" -v heldout="$tmp/heldout" '
BEGIN {
    n = split("Ge Genesis|Exo Exodus|Lev Leviticus|Num Numbers|Deu Deuteronomy|Josh Joshua|Jdgs Judges|Ruth Ruth|" \
        "1Sm 1 Samuel|2Sm 2 Samuel|1Ki 1 Kings|2Ki 2 Kings|1Chr 1 Chronicles|2Chr 2 Chronicles|Ezra Ezra|" \
        "Neh Nehemiah|Est Esther|Job Job|Psa Psalm|Prv Proverbs|Eccl Ecclesiastes|SSol Song of Solomon|Isa Isaiah|" \
        "Jer Jeremiah|Lam Lamentations|Eze Ezekiel|Dan Daniel|Hos Hosea|Joel Joel|Amos Amos|Obad Obadiah|" \
        "Jonah Jonah|Mic Micah|Nahum Nahum|Hab Habakkuk|Zep Zephaniah|Hag Haggai|Zec Zechariah|Mal Malachi|" \
        "Mat Matthew|Mark Mark|Luke Luke|John John|Acts Acts|Rom Romans|1Cor 1 Corinthians|2Cor 2 Corinthians|" \
        "Gal Galatians|Eph Ephesians|Phi Philippians|Col Colossians|1Th 1 Thessalonians|2Th 2 Thessalonians|" \
        "1Tim 1 Timothy|2Tim 2 Timothy|Titus Titus|Phmn Philemon|Heb Hebrews|Jas James|1Pet 1 Peter|2Pet 2 Peter|" \
        "1Jn 1 John|2Jn 2 John|3Jn 3 John|Jude Jude|Rev Revelation", books, "|")
    for (i = 1; i <= n; i++) {
        space = index(books[i], " ")
        name[substr(books[i], 1, space - 1)] = substr(books[i], space + 1)
    }
}
function fail(why) {
    print "prepare.sh: line " NR " of the source: " why > "/dev/stderr"
    failed = 1
    exit 1
}
{
    if (!match($1, /^[0-9]?[A-Za-z]+/)) fail("no verse reference")
    book = substr($1, 1, RLENGTH)
    if (!(book in name)) fail("unknown book " book)
    split(substr($1, RLENGTH + 1), number, ":")
    $1 = ""                                  # also joins the words by single spaces
    verse = substr($0, 2)
    if (verse !~ /^[ -~]+$/) fail("not plain ASCII")
    heading = name[book] " " number[1]
    if (heading != last) {
        last = heading
        file = (++chapters % 40 == 20) ? heldout : train
        print (file in begun ? "\n" : "") heading > file
        begun[file] = 1
    }
    print verse > file
}
END {
    if (failed) exit 1
    if (NR != 31102 || chapters != 1189) {
        print "prepare.sh: " NR " verses in " chapters " chapters, expected 31102 in 1189" > "/dev/stderr"
        exit 1
    }
}' "$tmp/verses"

for f in train heldout; do
    mv "$tmp/$f" "$out/$f.txt"
    chmod 644 "$out/$f.txt"
    echo "$(sha256sum "$out/$f.txt") $(wc -c <"$out/$f.txt") bytes $(wc -w <"$out/$f.txt") words"
done
