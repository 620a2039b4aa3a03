# The same as 20-loopback, with the kernel's initiator on 127.0.0.1.
. /bed/guest/lib.sh
. /bed/guest/disk-scenario.sh iscsi
