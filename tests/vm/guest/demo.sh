# The main job, shown: a qcow2 image over a backing file becomes a SCSI disk by targetcli, locally and over iSCSI.
# `make demo` runs it; it is not a test, but it fails when anything in it fails.
. /bed/guest/lib.sh

show() { printf '\n$ %s\n' "$*"; "$@" 2>&1 | grep -v 'preferences file' || [ "${PIPESTATUS[0]}" = 0 ] || fail "$*"; }

printf '\nThis is %s, kernel %s.\n' "$(. /etc/os-release && echo "$PRETTY_NAME")" "$(uname -r)"
cd "$(dirname "$(take_sample overlay.qcow2 demo)")"
printf '\n$ img-tcmu serve &\n'
start_daemon
show img-tcmu info overlay.qcow2
show targetcli /backstores/user:img create name=demo size=32M "cfgstring=@id=demo@file=$PWD/overlay.qcow2"
naa=$(naa_of demo)
show targetcli /loopback create "$naa"
show targetcli "/loopback/$naa/luns" create /backstores/user:img/demo
loopback_disk "$naa"
show targetcli ls /backstores/user:img
show lsblk -o NAME,SIZE,TYPE,VENDOR,MODEL "$DISK"
partition 1 >/dev/null
show mount "${DISK}1" /mnt
show ls -l /mnt /mnt/notes
show cat /mnt/ADDED.txt
show umount /mnt
loopback_down demo
printf '\nThe same backstore over iSCSI, from this machine to itself:\n'
iscsi_up demo
show lsblk -S -o NAME,TRAN,SIZE,VENDOR,MODEL "$DISK"
partition 1 >/dev/null
show mount "${DISK}1" /mnt
show cat /mnt/HELLO.txt
echo "written through iSCSI" >/mnt/NEW.txt
printf '\n$ echo "written through iSCSI" >/mnt/NEW.txt\n'
show umount /mnt
iscsi_down demo
delete_backstore demo
stop_daemon
show qemu-img check overlay.qcow2
printf '\nThe file system inside the image, from /dev/sdX:\n'
start_daemon
text=$(timeout "$PATIENCE" img-tcmu attach "$PWD/overlay.qcow2" --name demo)
DISK=$(grep -o '/dev/sd[a-z]*' <<<"$text" | head -1)
printf '\n$ img-tcmu attach overlay.qcow2 --name demo\n%s\n' "$text"
partition 1 >/dev/null
show mount "${DISK}1" /mnt
show df -h /mnt
show ls -lR /mnt
umount /mnt
timeout "$PATIENCE" img-tcmu detach demo >/dev/null
stop_daemon
