#!/bin/sh
# The first and only process of the micro guest (tools/images/micro.py). What it should do is told by the machine: words
# in the family of its SMBIOS system information (qemu: -smbios type=1,family="check load"):
#   check      repair the filesystem, then tell its state and the database's
#   write=NAME make the file /written/NAME, durably
#   load       transactions on the database without end, each told when it is durable
#   stream     write files, none durably, and look in the end whether the disk has what was written
#   off        power off at the end, instead of staying
# Without any it reads only. Everything it tells is a line on the console that begins with XBFS-.
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
exec </dev/console >/dev/console 2>&1
for module in $(cat /modules/order); do insmod "/modules/$module" 2>/dev/null; done

disk=
tries=0
while [ -z "$disk" ] && [ $tries -lt 300 ]; do
    for name in vda2 nvme0n1p2 sda2 xvda2; do [ -b "/dev/$name" ] && disk=$name; done
    [ -n "$disk" ] || usleep 100000
    tries=$((tries + 1))
done
[ -n "$disk" ] || echo "XBFS-NO-DISK"

family=$(cat /sys/class/dmi/id/product_family 2>/dev/null)
has() { case " $family " in *" $1"*) return 0 ;; *) return 1 ;; esac; }

if has check; then
    e2fsck -f -p "/dev/$disk"
    echo "XBFS-FSCK status=$?"
    e2fsck -f -n "/dev/$disk" >/dev/null 2>&1
    echo "XBFS-FSCK-AGAIN status=$?"
fi
mode=ro
{ has write= || has load || has check || has stream; } && mode=rw
mount -t ext4 -o "$mode" "/dev/$disk" /mnt || echo "XBFS-MOUNT-FAILED dev=$disk"

sum=$(sha256sum /mnt/payload | cut -c1-64)
if [ "$sum" = "$(cat /mnt/payload.sha256)" ]; then result=OK; else result=BAD; fi
echo "XBFS-BOOT-$result dev=$disk sha=$(echo "$sum" | cut -c1-12) up=$(cut -d' ' -f1 /proc/uptime)"

next=1
if has check || has load; then
    # A database needs its directory made before it is opened for the first time.
    [ -d /mnt/db ] || { mkdir /mnt/db && sync; }
    if has check && [ -f /mnt/db/load.db ]; then
        echo "XBFS-DB $(sqlite3 /mnt/db/load.db 'PRAGMA integrity_check' 2>&1 | head -n 1)" \
            "$(sqlite3 -separator ' ' /mnt/db/load.db \
                "SELECT 'count='||count(*), 'highest='||max(n), 'whole='||(sum(length(data)=2000)=count(*)) FROM load" 2>&1)"
    fi
fi
for word in $family; do
    case $word in write=*)
        mkdir -p /mnt/written
        echo "written by the guest: ${word#write=}" >"/mnt/written/${word#write=}" && sync &&
            echo "XBFS-WRITTEN ${word#write=}"
        ;;
    esac
done
if has stream; then
    # The kernel writes soon, and flushes nothing but its own journal.
    echo 262144 >/proc/sys/vm/dirty_background_bytes
    echo 50 >/proc/sys/vm/dirty_writeback_centisecs
    echo 50 >/proc/sys/vm/dirty_expire_centisecs
    mkdir -p /mnt/stream /kept
    for pass in 1 2 3 4 5 6; do
        for number in 1 2 3 4 5 6 7 8; do
            head -c 1048576 /dev/urandom >"/kept/$pass.$number"
            cp "/kept/$pass.$number" /mnt/stream
        done
        sleep 1
        echo "XBFS-STREAM pass=$pass"
    done
    sync
    echo 3 >/proc/sys/vm/drop_caches
    wrong=0
    for file in /kept/*; do
        cmp -s "$file" "/mnt/stream/${file##*/}" || wrong=$((wrong + 1))
    done
    echo "XBFS-STREAMED wrong=$wrong"
fi
if has load; then
    sqlite3 /mnt/db/load.db 'CREATE TABLE IF NOT EXISTS load(n INTEGER PRIMARY KEY, data TEXT)'
    next=$(($(sqlite3 /mnt/db/load.db 'SELECT coalesce(max(n), 0) FROM load') + 1))
    echo "XBFS-LOAD from=$next"
    (
        # FULL would not do: the journal's removal is the commit, and only EXTRA makes that durable before it returns.
        echo 'PRAGMA synchronous=EXTRA;'
        while :; do
            echo "BEGIN; INSERT INTO load VALUES($next, hex(randomblob(1000)));"
            echo "UPDATE load SET data = hex(randomblob(1000)) WHERE n = $next / 2; COMMIT; SELECT 'XBFS-ACK $next';"
            next=$((next + 1))
        done
    ) | sqlite3 -bail /mnt/db/load.db
    echo "XBFS-LOAD-ENDED status=$?"
fi
if has off; then
    umount /mnt
    poweroff -f
fi
while sleep 3600; do :; done
