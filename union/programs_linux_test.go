package union_test

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/layerfs/layerfs/internal/testenv"
	"github.com/layerfs/layerfs/union"
)

// A program is real work in a directory. Its output says what came of it, by
// the program's own means, and must be that of the same work in a plain one.
type program struct {
	name  string
	tools []string
	// before fills the directory; for a mount, its lower branch.
	before string
	script string
}

var programs = []program{
	{"git", []string{"git"}, `cd "$1"; export HOME="$1" GIT_CONFIG_NOSYSTEM=1; git init -q r; cd r
git config user.email a@b; git config user.name n; export GIT_AUTHOR_DATE='2020-01-01T00:00:00Z' GIT_COMMITTER_DATE='2020-01-01T00:00:00Z'
for i in $(seq 15); do mkdir -p d$((i%5)); seq $i 500 >d$((i%5))/f$i; git add .; git commit -q -m $i; done`,
		`cd "$1/r"; export HOME="$1" GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_DATE='2020-01-01T00:00:00Z' GIT_COMMITTER_DATE='2020-01-01T00:00:00Z'
for i in $(seq 16 30); do mkdir -p d$((i%5)); seq $i 500 >d$((i%5))/f$i; git add .; git commit -q -m $i; done
cp -r d1 e1; git rm -q -r d1; git add .; git commit -q -m moved; git clone -q . ../c; git -C ../c checkout -q -b other HEAD~10
git gc -q; git -C ../c fetch -q; git -C ../c gc -q --prune=now; git fsck --full 2>&1; git -C ../c fsck --full 2>&1
git rev-parse HEAD; git -C ../c rev-parse HEAD; git rev-list --count HEAD; git status --porcelain
find . ../c -name .git -prune -o -type f -print | sort | xargs sha256sum`},

	{"sqlite", []string{"sqlite3"}, `cd "$1"; sqlite3 t.db 'pragma journal_mode=wal; create table t(a, b); create index i on t(a);'
seq 2000 | sed "s/.*/insert into t values(&, hex(zeroblob(50)));/" | (echo 'begin;'; cat; echo 'commit;') | sqlite3 t.db`,
		`cd "$1"; for mode in wal delete persist; do sqlite3 t.db "pragma journal_mode=$mode; pragma mmap_size=50000000; pragma synchronous=full;
update t set b = b || 'x' where a % 3 = 0; delete from t where a % 7 = 0;"
for k in 1 2 3; do seq 300 | sed "s/.*/insert into t values(&, '$mode');/" | (echo 'begin;'; cat; echo 'commit;') | sqlite3 -cmd 'pragma mmap_size=50000000' t.db; done; done
(sqlite3 -cmd '.timeout 20000' t.db 'update t set a = a + 1;' & sqlite3 -cmd '.timeout 20000' t.db 'update t set a = a + 1;'; wait)
sqlite3 t.db 'pragma integrity_check; vacuum; pragma integrity_check; select count(*), sum(a), sum(length(b)) from t;'; ls`},

	{"postgres", []string{"runuser", "initdb"}, ``,
		`export LC_ALL=C PGHOST="$1/run" PGDATA="$1/pg"; mkdir -m 700 "$1/pg" "$1/run"; chown postgres "$1/pg" "$1/run"; cd "$1/run"
as() { runuser -u postgres --preserve-environment -- "$@"; }
as initdb -k >/dev/null; echo "listen_addresses=''
unix_socket_directories='$1/run'" >>"$1/pg/postgresql.conf"
as pg_ctl -s -w -l "$1/run/log" start; trap 'as pg_ctl -s -m immediate stop 2>/dev/null || true' EXIT
as createdb b; as pgbench -q -i -s 1 b >/dev/null 2>&1; as pgbench -n -c 4 -j 2 -t 50 b >/dev/null 2>&1
as psql -qAt b -c 'create table k as select g, md5(g::text) h from generate_series(1, 20000) g' \
 -c 'create index on k(h)' -c 'delete from k where g % 3 = 0' -c 'vacuum full k'
as pg_ctl -s -m immediate stop; as pg_ctl -s -w -l "$1/run/log" start # recovers from its log
as psql -qAt b -c 'select count(*) from pgbench_history; select sum(abalance) = (select sum(bbalance) from pgbench_branches) from pgbench_accounts' \
 -c 'select count(*), md5(string_agg(h, null order by g)) from k'
as pg_ctl -s -m fast stop; as pg_checksums --check | grep Bad`},

	{"make", []string{"make", "gcc", "ar"}, `cd "$1"; mkdir src; for i in $(seq 24); do echo "#include \"all.h\"
int f$i(int x) { return x * $i + K; }" >src/f$i.c; echo "int f$i(int);" >>src/all.h; done; echo '#define K 1' >>src/all.h
{ echo '#include <stdio.h>
#include "all.h"
int main(void) { int s = 0;'; for i in $(seq 24); do echo "s += f$i(3);"; done; echo 'printf("%d ", s); return 0; }'; } >src/main.c
cat >Makefile <<'END'
O := $(patsubst src/f%.c,o/f%.o,$(wildcard src/f*.c))
main: o/main.o lib.a; gcc -o $@ o/main.o lib.a
lib.a: $(O); rm -f $@; ar rcD $@ $(sort $(O))
o/%.o: src/%.c | o; gcc -g0 -O1 -MMD -c -o $@ $<
o:; mkdir o
-include $(wildcard o/*.d)
END
touch -d '1 hour ago' src/* Makefile; make -s -j2 o/f1.o o/f2.o o/f3.o`,
		`cd "$1"; make -j2 | grep -c gcc; ./main; make; echo '#define K 2' >src/new; cat src/new >>src/all.h; sed -i '/K 1/d' src/all.h; touch -d 'now + 1 min' src/all.h
make -j2 2>&1 | grep -c -- -MMD; ./main; sha256sum main lib.a o/*.o; strip main; ./main; mv o p; mv p o; find . -type f | sort; rm -rf o; ls`},

	{"dpkg", []string{"dpkg", "dpkg-deb"}, `cd "$1"; mkdir deb; pack() { # NAME VERSION: the tree in t
mkdir t/DEBIAN; printf 'Package: %s\nVersion: %s\nArchitecture: all\nMaintainer: n <a@b>\nDescription: d\n' $1 $2 >t/DEBIAN/control
if [ -d t/etc ]; then (cd t; find etc -type f | sort | sed s,^,/,) >t/DEBIAN/conffiles; fi
dpkg-deb --root-owner-group -Znone -b t deb/$1_$2.deb >/dev/null; rm -rf t; }
for v in 1 2 3; do mkdir -p t/usr/share/a t/usr/lib/a t/etc/a; for i in $(seq 150); do mkdir -p t/usr/share/a/$((i%7)); echo "$v $i" >t/usr/share/a/$((i%7))/$((i*v)); done
ln t/usr/share/a/1/$v t/usr/lib/a/hard; ln -s ../../share/a t/usr/lib/a/soft; echo $v >t/etc/a/conf; echo same >t/etc/a/kept; chmod 4755 t/usr/lib/a/hard; pack a $v; done
mkdir -p t/usr/lib/b; for f in /bin/tar /bin/sed /bin/grep /usr/bin/perl; do cp $f t/usr/lib/b/; done; pack b 1; mkdir -p t/usr/lib; echo x >t/usr/lib/c; pack c 1
mkdir -p root/var/lib/dpkg/info root/var/lib/dpkg/updates; touch root/var/lib/dpkg/status root/var/lib/dpkg/available
dpkg --root="$1/root" --log=/dev/null -i deb/a_1.deb deb/b_1.deb >/dev/null`,
		`cd "$1"; d() { r="$1"; shift; dpkg --root="$r" --log=/dev/null --force-confold "$@" >/dev/null 2>&1; }
d "$1/root" -i deb/a_2.deb; echo local >root/etc/a/conf; d "$1/root" -i deb/a_3.deb deb/c_1.deb; d "$1/root" -r b; d "$1/root" -i deb/b_1.deb; d "$1/root" -i deb/a_1.deb; d "$1/root" -P c
dpkg --root="$1/root" -l | tail -n +6; dpkg --root="$1/root" -V; cd root; find . -path ./var/lib/dpkg/lock\* -prune -o -type d -printf '%y %m %p\n' -o -printf '%y %m %n %p %l\n' | sort; find . -type f -not -name lock\* | sort | xargs sha256sum
dpkg --root="$1/root" --log=/dev/null -P a b >/dev/null 2>&1; find usr etc 2>/dev/null | sort`},

	{"tar", []string{"tar"}, `cd "$1"; mkdir s; for i in $(seq 300); do mkdir -p s/d$((i%7)); echo $i >s/d$((i%7))/$i; ln s/d$((i%7))/$i s/d$((i%7))/l$i; done`,
		`cd "$1"; tar cf a.tar s; mkdir x; tar xf a.tar -C x; diff -r s x/s; for i in $(seq 100); do rm s/d$((i%7))/$i; done; tar cf b.tar s; rm -rf x; mkdir x; tar xf b.tar -C x
diff -r s x/s; find s x -type f -printf '%n %p\n' | sort; rm -rf s; test ! -e s; rm -rf x`},
}

// addPostgres puts the newest PostgreSQL in PATH for the test: Debian keeps the
// programs of each version in a directory of its own.
func addPostgres(t *testing.T) {
	dirs, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	require.NoError(t, err)
	version := func(dir string) (n int) {
		fmt.Sscan(filepath.Base(filepath.Dir(dir)), &n)
		return n
	}
	if len(dirs) > 0 {
		newest := slices.MaxFunc(dirs, func(a, b string) int { return cmp.Compare(version(a), version(b)) })
		t.Setenv("PATH", os.Getenv("PATH")+":"+newest)
	}
}

// TestPrograms lets real programs work in a mount and beside it.
func TestPrograms(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			needMount(t)
			if p.name == "postgres" {
				addPostgres(t)
			}
			for _, tool := range p.tools {
				backends := []string{"union"}
				if tool == "initdb" { // a server is much to ask for
					backends = nil
				}
				testenv.RequireTool(t, tool, backends...)
			}
			plain, err := os.MkdirTemp("", "plain")
			require.NoError(t, err)
			defer os.RemoveAll(plain)
			require.NoError(t, os.Chmod(plain, 0o755)) // other users take part
			s := prepare(t, 1)
			sh(t, p.before, plain)
			sh(t, p.before, s.lower(0, ""))
			before := shot(t, s.lower(0, ""))
			s.mount(t, union.Config{AllowSuid: true})
			want := sh(t, p.script, plain)
			require.NotEmpty(t, want)
			assert.Equal(t, want, sh(t, p.script, s.mnt))
			assert.Equal(t, before, shot(t, s.lower(0, "")), "the lower branch changed")
		})
	}
}
