#!/bin/sh
# A stand-in for an engine, started as one: serve --model DIR ... with its socket as descriptor 3.
# Sends the frames that a test writes into DIR/events, keeps the commands that it gets in DIR/commands, and exits with
# the status in DIR/exit when the test closes DIR/events.
dir=$3
cat <&3 >"$dir/commands" &
exec 4<"$dir/events"
: >"$dir/listens"
cat <&4 >&3
kill $!
exit "$(cat "$dir/exit")"
