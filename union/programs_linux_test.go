package union_test

import (
	"os/exec"
	"testing"

	"github.com/stretchr/testify/assert"
)

// TestPrograms lets real programs work in a mount and checks their results
// with the programs' own means, and against a plain directory.
func TestPrograms(t *testing.T) {
	if testing.Short() {
		t.Skip("takes seconds")
	}
	for _, p := range []struct{ name, tool, script string }{
		{"git", "git", `cd "$1"; export HOME="$1" GIT_CONFIG_NOSYSTEM=1; git init -q r; cd r
git config user.email a@b; git config user.name n
for i in $(seq 30); do mkdir -p d$((i%5)); seq $i 500 >d$((i%5))/f$i; git add .; git commit -q -m $i; done
git mv d1 e1; git commit -q -m moved; git gc -q; git clone -q . ../c; git fsck --full; cd ../c; test "$(git rev-list --count HEAD)" = 31
git status --porcelain; find . -path ./.git -prune -o -type f -print | sort | xargs sha256sum`},
		{"sqlite", "sqlite3", `cd "$1"; sqlite3 t.db 'pragma journal_mode=wal; pragma mmap_size=50000000; create table t(a, b);'
for k in 1 2 3; do seq 500 | sed "s/.*/insert into t values(&, hex(zeroblob(50)));/" | (echo 'begin;'; cat; echo 'commit;') | sqlite3 t.db; done
sqlite3 t.db 'pragma integrity_check; update t set a = a + 1; vacuum; select count(*), sum(a) from t;'`},
		{"cc", "gcc", `cd "$1"; for i in $(seq 10); do echo "int f$i(int x){return x*$i;}" >f$i.c; gcc -O1 -c f$i.c & done; wait
echo '#include <stdio.h>' >m.c; for i in $(seq 10); do echo "int f$i(int);" >>m.c; done
echo 'int main(void){int s=0;' >>m.c; for i in $(seq 10); do echo "s+=f$i(3);" >>m.c; done; echo 'printf("%d",s);return 0;}' >>m.c
gcc -o m m.c f*.o; ./m`},
		{"tar", "tar", `cd "$1"; mkdir s; for i in $(seq 300); do mkdir -p s/d$((i%7)); echo $i >s/d$((i%7))/$i; ln s/d$((i%7))/$i s/d$((i%7))/l$i; done
tar cf a.tar s; mkdir x; tar xf a.tar -C x; diff -r s x/s; find x -links 2 -type f | wc -l; rm -rf s; test ! -e s; rm -rf x`},
	} {
		t.Run(p.name, func(t *testing.T) {
			if _, err := exec.LookPath(p.tool); err != nil {
				t.Skip("no " + p.tool)
			}
			s := mustMount(t, 1, "l0/some/file x")
			assert.Equal(t, sh(t, p.script, t.TempDir()), sh(t, p.script, s.mnt))
		})
	}
}
