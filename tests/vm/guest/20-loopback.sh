# Images of every kind as local disks: read whole, mounted, written, made anew; always compared with qemu-img.
. /bed/guest/lib.sh
. /bed/guest/disk-scenario.sh loopback
