# libiscsi's conformance suite, all of it, against committed tables of results. CONFORMANCE chooses what is run (words
# FORMAT:BLOCKSIZE); the tables found are left in /bed/out.
. /bed/guest/lib.sh
start_daemon
mkdir -p /scratch/c
differ=
for case in ${CONFORMANCE:-raw:512 qcow2:512 vhdx:512 raw:4096 qcow2:4096 vhdx:4096}; do
    format=${case%:*} block=${case#*:} name=c$format$block
    step "$format, blocks of $block"
    qemu-img create -q -f "$format" "/scratch/c/$name" 256M
    [ "$case" != vhdx:4096 ] || python3 /bed/guest/vhdx-sectors.py "/scratch/c/$name" 4096
    options=@format=$format
    text=$(targetcli_once "/backstores/user:$SUBTYPE" create "name=$name" size=256M \
        "cfgstring=@id=$name@file=/scratch/c/$name$options" "control=hw_block_size=$block" 2>&1) || fail "create: $text"
    iscsi_target_up "$name"
    # Twice the same portal is two sessions: the second path of the multipath tests.
    url=$(url_of "$name")
    iscsi-test-cu --dataloss --allow-sanitize -v -t ALL "$url" "$url" >"/bed/out/$name.txt" 2>&1 || true
    daemon_alive || fail "the daemon died: $(tail -n 5 "/bed/out/$name.txt")"
    expected=/bed/guest/expected/conformance-$format-$block.txt
    python3 /bed/guest/conformance.py "/bed/out/$name.txt" "/bed/out/conformance-$format-$block.txt" "$expected" ||
        differ="$differ $case"
    targetcli_once /iscsi delete "$(iqn_of "$name")" >/dev/null
    delete_backstore "$name"
    case $case in
        raw:*) ;;
        vhdx:4096) img-tcmu check "/scratch/c/$name" || fail "the image is damaged" ;; # QEMU knows no such sectors
        *) qemu-img check "/scratch/c/$name" || fail "the image is damaged" ;;
    esac
done
stop_daemon
[ -z "$differ" ] || fail "other results than the tables say:$differ"
