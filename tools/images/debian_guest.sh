#!/bin/sh
# Runs in the Debian guest (tools/images/debian_guest.py) once it is up. What it should do is told by the machine, in the
# same words as for the micro guest (micro_init.sh): check, write=NAME, load, off. It tells on the serial console.
exec >/dev/ttyS0 2>&1
family=$(cat /sys/class/dmi/id/product_family 2>/dev/null)
has() { case " $family " in *" $1"*) return 0 ;; *) return 1 ;; esac; }
ask() { runuser -u postgres -- psql -X -q -A -t -F ' ' "$@"; }

result=OK
dpkg --verify coreutils postgresql-15 2>&1 | grep -v '^missing' | grep -q . && result=BAD
echo "XBFS-BOOT-$result dev=$(findmnt -no SOURCE /) up=$(cut -d' ' -f1 /proc/uptime)"
if has check || has load; then
    until ask -c 'SELECT 1' >/dev/null 2>&1; do sleep 0.2; done
    if has check; then
        echo "XBFS-FSCK status=$(systemctl show -P ExecMainStatus systemd-fsck-root)"
        dumped=ok
        runuser -u postgres -- pg_dumpall >/dev/null || dumped=damaged
        echo "XBFS-DB $dumped $(ask -c "SELECT 'count='||count(*), 'highest='||coalesce(max(n), 0),
            'whole='||CASE WHEN bool_and(length(data) = 2048) THEN 1 ELSE 0 END FROM load")"
    fi
fi
for word in $family; do
    case $word in write=*)
        mkdir -p /written
        echo "written by the guest: ${word#write=}" >"/written/${word#write=}" && sync &&
            echo "XBFS-WRITTEN ${word#write=}"
        ;;
    esac
done
if has load; then
    next=$(ask -c 'SELECT coalesce(max(n), 0) + 1 FROM load')
    echo "XBFS-LOAD from=$next"
    (
        while :; do
            echo "BEGIN; INSERT INTO load SELECT $next, string_agg(md5(random()::text), '') FROM generate_series(1, 64);"
            echo "UPDATE load SET data = reverse(data) WHERE n = $next / 2; COMMIT; SELECT 'XBFS-ACK $next';" || exit
            next=$((next + 1))
        done
    ) | ask -v ON_ERROR_STOP=1
    echo "XBFS-LOAD-ENDED status=$?"
fi
has off && systemctl poweroff 2>/dev/null
