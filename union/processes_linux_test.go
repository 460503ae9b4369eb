package union_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/union"
)

// historyEnv makes this test binary do a random history: "SEED LINKS ROOT..."
// on directories that must answer alike, or on one that others use, too.
const historyEnv = "LAYERFS_TEST_HISTORY"

func historyClient(arg string) error {
	f := strings.Fields(arg)
	var seed uint64
	if _, err := fmt.Sscan(f[0], &seed); err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(seed, 3))
	roots := f[2:]
	var log []string
	for k := range 120 {
		st := randomStep(r, k, f[1] == "links")
		err := st.do(roots[0])
		log = append(log, fmt.Sprintf("%s = %v", st.name, err))
		if len(roots) == 1 {
			// Others change the tree between the calls of one step, but no
			// answer may be one that a plain directory cannot give.
			if errors.Is(err, unix.EIO) || errors.Is(err, unix.ESTALE) {
				return fmt.Errorf("seed %d: %s: %w", seed, st.name, err)
			}
			continue
		}
		if errors.Is(err, unix.EXDEV) {
			continue
		}
		if want := st.do(roots[1]); !errors.Is(err, want) && err != want {
			return fmt.Errorf("seed %d: %v, plain %w\n%s", seed, err, want, strings.Join(log, "\n"))
		}
	}
	return nil
}

// TestProcesses lets several processes work in one mount at once: each does
// a history in a directory of its own, which a plain copy must equal in the end,
// and a history where all work in one, which must be sound in the end.
func TestProcesses(t *testing.T) {
	rounds := 6
	if testing.Short() {
		rounds = 1
	}
	if s := os.Getenv("LAYERFS_HISTORIES"); s != "" {
		n := 0
		_, err := fmt.Sscan(s, &n)
		require.NoError(t, err)
		rounds = max(n/40, 1)
	}
	const procs = 4
	self, err := os.Executable()
	require.NoError(t, err)
	for round := range rounds {
		t.Run(fmt.Sprint("round=", round), func(t *testing.T) {
			s := prepare(t, 2)
			r := rand.New(rand.NewPCG(uint64(round), 11))
			for p := range procs {
				for _, top := range []string{fmt.Sprint("own", p), "all"} {
					require.NoError(t, os.MkdirAll(s.lower(1, top), 0o755))
					for k := range 30 {
						st := randomStep(r, k, true)
						if !strings.HasPrefix(st.name, "rename") && !strings.HasPrefix(st.name, "unlink") {
							_ = st.do(s.lower(1, top)) // what is possible makes the tree
						}
					}
				}
			}
			plain := s.dir + "/plain"
			sh(t, `cp -a "$1" "$2"`, s.lower(1, ""), plain)
			s.mount(t, union.Config{NoPassthrough: round%3 == 2})
			var wg sync.WaitGroup
			run := func(args ...any) {
				wg.Go(func() {
					cmd := exec.Command(self)
					cmd.Env = append(os.Environ(), historyEnv+"="+strings.TrimSpace(fmt.Sprintln(args...)))
					out, err := cmd.CombinedOutput()
					assert.NoError(t, err, "%s", out)
				})
			}
			for p := range procs {
				own := fmt.Sprint("/own", p)
				run(round*100+p, "links", s.mnt+own, plain+own)
				run(round*100+50+p, "links", s.mnt+"/all")
			}
			wg.Wait()
			before := shot(t, s.path("all")) // every name can be looked up and read
			for p := range procs {
				own := fmt.Sprint("/own", p)
				require.Equal(t, shot(t, plain+own), shot(t, s.mnt+own), "process %d", p)
			}
			require.NoError(t, s.Unmount(bg))
			s.mount(t, union.Config{})
			assert.Empty(t, s.Repaired())
			for p := range procs {
				own := fmt.Sprint("/own", p)
				require.Equal(t, shot(t, plain+own), shot(t, s.mnt+own), "process %d", p)
			}
			require.Equal(t, before, shot(t, s.path("all")))
		})
	}
}
