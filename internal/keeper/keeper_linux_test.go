package keeper

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/layerfs/layerfs/internal/sys"
	"github.com/layerfs/layerfs/internal/testenv"
)

// The worker of the tests does what it is told. Its state is a file that
// everybody appends to.
type order struct {
	Op     string // store, drop, next, list, exit, hang, stuck
	Name   string
	Text   string
	Argv   []string
	Exit   int
	Items  map[string]string // answer to list
	Bytes  []byte
	PID    int
	Keeper int
	Err    string
}

func TestMain(m *testing.M) {
	if status, helper := Main(os.Args, testProgram()); helper {
		os.Exit(status)
	}
	os.Exit(testenv.Main(m))
}

// testVersion is what makes the version of the test program another.
const testVersion = "LAYERFS_TEST_VERSION"

func testProgram() Program {
	version, err := strconv.Atoi(os.Getenv(testVersion))
	if err != nil {
		version = 7
	}
	return Program{Work: testWorker, Version: version}
}

func testWorker(w *Worker) error {
	items := map[string]string{}
	var mu sync.Mutex
	stored := map[string]string{} // guarded by mu
	var stuck atomic.Bool
	for _, it := range w.Kept() {
		f := os.NewFile(uintptr(it.FDs[0]), it.Name)
		b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
		if err != nil {
			return err
		}
		items[it.Name], stored[it.Name] = string(b), string(b)
	}
	hand := func() error {
		mu.Lock()
		defer mu.Unlock()
		for name, text := range stored {
			if err := store(w, name, text); err != nil {
				return err
			}
		}
		return nil
	}
	if err := w.Ready(Duties{Hand: hand, Alive: func() bool { return !stuck.Load() }}); err != nil {
		return err
	}
	for {
		c, err := w.Accept()
		if err != nil {
			return err
		}
		var o order
		fds, err := c.Recv(&o)
		if err != nil {
			c.Close()
			continue
		}
		CloseAll(fds)
		switch o.Op {
		case "store":
			mu.Lock()
			stored[o.Name] = o.Text
			mu.Unlock()
			err = store(w, o.Name, o.Text)
		case "drop":
			mu.Lock()
			maps.DeleteFunc(stored, func(name, _ string) bool { return name == o.Name || strings.HasPrefix(name, o.Name+"/") })
			mu.Unlock()
			err = w.Drop(o.Name)
		case "stuck":
			stuck.Store(true)
		case "next":
			err = w.Next(o.Argv)
		case "exit":
			os.Exit(o.Exit)
		case "hang":
			// The answer first; what is left does not react to anything.
			_ = c.Send(order{})
			_ = unix.Kill(os.Getpid(), unix.SIGSTOP)
			select {} // another thread may have taken the signal
		}
		a := order{Items: items, PID: os.Getpid(), Keeper: w.Keeper(), Text: strings.Join(os.Environ(), "\n")}
		if err != nil {
			a.Err = err.Error()
		}
		_ = c.Send(a)
		c.Close()
	}
}

func store(w *Worker, name, text string) error {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(text)); err != nil {
		return err
	}
	return w.Store(name, 0, fd)
}

func tell(t *testing.T, dir string, command []string, o order) order {
	t.Helper()
	c, err := Dial(t.Context(), dir, command)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(30*time.Second)))
	require.NoError(t, c.Send(o))
	var a order
	_, err = c.Recv(&a)
	if o.Op != "exit" {
		require.NoError(t, err)
	}
	require.Empty(t, a.Err)
	return a
}

// inTest runs a keeper as a goroutine, with short times.
func inTest(t *testing.T) (dir string, k *keeper, end func() error) {
	t.Helper()
	dir = t.TempDir()
	k, err := newKeeper(dir)
	require.NoError(t, err)
	require.NotNil(t, k)
	k.pulse, k.silence = 20*time.Millisecond, 3*time.Second
	started, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- k.run(nil, func() { close(started) }) }()
	<-started
	end = sync.OnceValue(func() error {
		err := <-done
		k.close()
		return err
	})
	return dir, k, end
}

// TestHandOver: a worker gets all that earlier ones stored, and only that.
func TestHandOver(t *testing.T) {
	dir, _, end := inTest(t)
	want := map[string]string{}
	put := func(name, text string) {
		tell(t, dir, nil, order{Op: "store", Name: name, Text: text})
		want[name] = text
	}
	put("1", "one")
	put("2", "two")
	put("1/a", "part of one")
	put("10", "ten")
	first := tell(t, dir, nil, order{Op: "list"})
	require.Empty(t, first.Items)
	require.NoError(t, unix.Kill(first.PID, unix.SIGKILL))
	second := tell(t, dir, nil, order{Op: "list"}) // waits for the worker
	require.NotEqual(t, first.PID, second.PID)
	require.Equal(t, want, second.Items)
	put("2", "two again")
	tell(t, dir, nil, order{Op: "drop", Name: "1"})
	delete(want, "1")
	delete(want, "1/a")
	tell(t, dir, nil, order{Op: "exit", Exit: ExitNext})
	require.Equal(t, want, tell(t, dir, nil, order{Op: "list"}).Items)
	tell(t, dir, nil, order{Op: "exit"}) // status 0, but there is something to do
	require.Equal(t, want, tell(t, dir, nil, order{Op: "list"}).Items)
	for name := range want {
		tell(t, dir, nil, order{Op: "drop", Name: name})
	}
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, end())
	_, err := Dial(t.Context(), dir, nil)
	require.ErrorIs(t, err, ErrNone)
}

// TestSilence: a worker that gives no sign of life is replaced.
func TestSilence(t *testing.T) {
	dir, _, end := inTest(t)
	tell(t, dir, nil, order{Op: "store", Name: "x", Text: "kept"})
	before := tell(t, dir, nil, order{Op: "list"})
	t.Cleanup(func() {
		if t.Failed() { // stopped, it would stay for ever
			_ = unix.Kill(before.PID, unix.SIGKILL)
		}
	})
	tell(t, dir, nil, order{Op: "hang"})
	after := tell(t, dir, nil, order{Op: "list"})
	require.NotEqual(t, before.PID, after.PID)
	require.Equal(t, map[string]string{"x": "kept"}, after.Items)
	// One that takes calls, but does not do what it is for.
	tell(t, dir, nil, order{Op: "stuck"})
	require.Eventually(t, func() bool { return unix.Kill(after.PID, 0) == unix.ESRCH }, 10*time.Second, 10*time.Millisecond)
	require.Equal(t, map[string]string{"x": "kept"}, tell(t, dir, nil, order{Op: "list"}).Items)
	tell(t, dir, nil, order{Op: "drop", Name: "x"})
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, end())
}

// killed kills a process and waits for its end.
func killed(t *testing.T, pid int) {
	t.Helper()
	require.NotZero(t, pid)
	require.NoError(t, unix.Kill(pid, unix.SIGKILL))
	require.Eventually(t, func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		return err != nil || strings.Contains(string(b), ") Z ")
	}, 10*time.Second, time.Millisecond)
}

// TestKeeperReplaced: a worker whose keeper was killed starts another and gives
// it all there is, so that the worker can be killed, too.
func TestKeeperReplaced(t *testing.T) {
	dir := t.TempDir()
	tell(t, dir, Self(), order{Op: "store", Name: "x", Text: "kept"})
	tell(t, dir, nil, order{Op: "store", Name: "x/1", Text: "part"})
	want := map[string]string{"x": "kept", "x/1": "part"}
	first := tell(t, dir, nil, order{Op: "list"})
	for round := range 3 {
		before := tell(t, dir, nil, order{Op: "list"})
		killed(t, before.Keeper)
		name := fmt.Sprint("y", round)
		tell(t, dir, nil, order{Op: "store", Name: name, Text: "later"}) // with the next one
		want[name] = "later"
		// What Next needs is that the keeper has all.
		tell(t, dir, nil, order{Op: "next"})
		after := tell(t, dir, nil, order{Op: "list"})
		require.Equal(t, before.PID, after.PID)
		require.NotEqual(t, before.Keeper, after.Keeper)
		if round == 1 {
			continue // a keeper in the place of one that was in another's
		}
		killed(t, after.PID)
		again := tell(t, dir, nil, order{Op: "list"})
		require.NotEqual(t, before.PID, again.PID)
		require.Equal(t, want, again.Items)
		require.Equal(t, after.Keeper, parent(t, again.PID))
	}
	log, err := os.ReadFile(dir + "/log")
	require.NoError(t, err)
	require.Contains(t, string(log), "the keeper was killed")
	// Nobody gets in between: the lock is held as ever.
	require.NoError(t, Start(t.Context(), dir, Self()))
	last := tell(t, dir, nil, order{Op: "list"})
	require.NotEqual(t, first.PID, last.PID)
	for name := range want {
		tell(t, dir, nil, order{Op: "drop", Name: name})
	}
	killed(t, last.Keeper)
	tell(t, dir, nil, order{Op: "next"})
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, Gone(t.Context(), dir))
}

// TestKillBoth kills keeper and worker one soon after the other. A helper goes
// on with all, or there is none, and the next call starts one: never two.
func TestKillBoth(t *testing.T) {
	dir := t.TempDir()
	lived := 0
	const rounds = 30
	for round := range rounds {
		tell(t, dir, Self(), order{Op: "store", Name: "x", Text: "kept"})
		a := tell(t, dir, nil, order{Op: "list"})
		require.NoError(t, unix.Kill(a.Keeper, unix.SIGKILL))
		time.Sleep(time.Duration(round) * time.Millisecond)
		require.NoError(t, unix.Kill(a.PID, unix.SIGKILL))
		// Two that call at once.
		var pids [2]int
		var wg sync.WaitGroup
		for k := range pids {
			wg.Go(func() {
				for pids[k] == 0 { // a call that a worker was given when it was killed ends
					pids[k] = called(t, dir)
				}
			})
		}
		wg.Wait()
		b := tell(t, dir, Self(), order{Op: "list"})
		require.NotEqual(t, a.PID, b.PID)
		require.Equal(t, b.PID, pids[0])
		require.Equal(t, b.PID, pids[1])
		if len(b.Items) > 0 {
			require.Equal(t, map[string]string{"x": "kept"}, b.Items)
			lived++
		}
	}
	t.Logf("%d of %d went on", lived, rounds)
	tell(t, dir, nil, order{Op: "drop", Name: "x"})
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, Gone(t.Context(), dir))
}

// called makes one call and returns who answered, 0 for nobody.
func called(t *testing.T, dir string) int {
	c, err := Dial(t.Context(), dir, Self())
	if !assert.NoError(t, err) {
		return -1
	}
	defer c.Close()
	var a order
	if c.Send(order{Op: "list"}) != nil {
		return 0
	}
	if _, err := c.Recv(&a); err != nil {
		return 0
	}
	return a.PID
}

// linked returns a worker, and the other end of its link in the place of a
// keeper, which is closed when the worker kills it.
func linked(t *testing.T) (w *Worker, keeper *Conn, kills chan struct{}, end func()) {
	t.Helper()
	a, b, err := pair()
	require.NoError(t, err)
	mine, err := NewConn(a)
	require.NoError(t, err)
	keeper, err = NewConn(b)
	require.NoError(t, err)
	t.Cleanup(func() { keeper.Close() })
	kills = make(chan struct{}, 100)
	l := newLink(mine, 1, func() { kills <- struct{}{}; keeper.Close() })
	w = newWorker(t.TempDir(), nil, nil, l)
	w.resendAfter, w.silence = 20*time.Millisecond, 200*time.Millisecond
	done := make(chan struct{})
	go func() { w.tend(l); close(done) }()
	return w, keeper, kills, func() { close(w.closed); <-done }
}

// TestStopped: a keeper that does not read keeps nobody waiting for longer than
// it may be silent.
func TestStopped(t *testing.T) {
	const many = 1000 // of which the socket takes some hundreds
	drop := func(t *testing.T, w *Worker) {
		began := time.Now()
		for range many {
			w.DropLater("x")
		}
		require.Less(t, time.Since(began), w.silence)
	}
	null, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer null.Close()
	t.Run("store", func(t *testing.T) {
		w, _, kills, end := linked(t)
		drop(t, w)
		began := time.Now()
		require.NoError(t, w.Store("x", 0, int(null.Fd())), "without a keeper")
		require.GreaterOrEqual(t, time.Since(began), w.silence)
		require.NotEmpty(t, kills)
		end()
	})
	t.Run("drop", func(t *testing.T) {
		w, _, kills, end := linked(t)
		drop(t, w)
		<-kills
		end()
	})
	t.Run("later", func(t *testing.T) {
		w, keeper, kills, end := linked(t)
		w.silence = time.Minute
		drop(t, w)
		stored := make(chan error)
		go func() { stored <- w.Store("x", 0, int(null.Fd())) }()
		time.Sleep(3 * w.resendAfter)
		var m message
		for range many {
			_, err := keeper.Recv(&m)
			require.NoError(t, err)
			require.Equal(t, message{Op: opDrop, Name: "x"}, m)
			m = message{}
		}
		fds, err := keeper.Recv(&m)
		require.NoError(t, err)
		CloseAll(fds)
		require.Equal(t, message{Op: opStore, Name: "x", Seq: 1}, m)
		require.NoError(t, keeper.Send(message{Op: opAck, Seq: 1}))
		require.NoError(t, <-stored)
		require.Empty(t, kills)
		keeper.Close()
		end()
	})
}

// TestAnswerLost: what the keeper did not confirm is told again, and a keeper
// that says nothing at all is killed.
func TestAnswerLost(t *testing.T) {
	w, keeper, kills, end := linked(t)
	heard := make(chan message, 100)
	go func() {
		for n := 0; ; n++ {
			var m message
			fds, err := keeper.Recv(&m)
			if err != nil {
				return
			}
			CloseAll(fds)
			heard <- m
			if n == 1 { // the first answer is lost
				_ = keeper.Send(message{Op: opAck, Seq: m.Seq})
			}
		}
	}()
	null, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer null.Close()
	require.NoError(t, w.Store("x", 3, int(null.Fd())))
	first, second := <-heard, <-heard
	require.Equal(t, first, second)
	require.Equal(t, message{Op: opStore, Name: "x", Conn: 3, Seq: 1}, first)
	require.Empty(t, kills)
	require.NoError(t, w.Store("y", 0, int(null.Fd())), "without a keeper")
	require.NotEmpty(t, kills)
	require.ErrorIs(t, w.Next(nil), ErrNoKeeper)
	end()
	require.Empty(t, w.waiting)
}

// TestFaulty: a keeper gives up on workers that die of their own fault, not on
// those that are killed.
func TestFaulty(t *testing.T) {
	dir, _, end := inTest(t)
	for _, signal := range []unix.Signal{unix.SIGKILL, unix.SIGTERM, unix.SIGINT, unix.SIGHUP} {
		for range faults {
			pid := tell(t, dir, nil, order{Op: "list"}).PID
			require.NoError(t, unix.Kill(pid, signal))
			require.Eventually(t, func() bool { // it may still take a call
				return unix.Kill(pid, 0) == unix.ESRCH
			}, 10*time.Second, time.Millisecond)
		}
	}
	for range faults {
		tell(t, dir, nil, order{Op: "exit", Exit: 3})
	}
	require.ErrorContains(t, end(), "again and again")
}

// TestScarce: calls wait while there are no descriptors for them, first for what
// accept(2) makes, then for its copy.
func TestScarce(t *testing.T) {
	dir, _, end := inTest(t)
	pid := tell(t, dir, nil, order{Op: "list"}).PID
	var before unix.Rlimit
	require.NoError(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &before))
	for extra := range uint64(2) {
		free := uint64(0)
		require.Eventually(t, func() bool { // the last call has been closed
			was := free
			for free = 0; ; free++ {
				if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", pid, free)); err != nil {
					return was == free
				}
			}
		}, 10*time.Second, 50*time.Millisecond)
		few := before
		few.Cur = free + extra
		require.NoError(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &few, nil))
		done := make(chan int)
		go func() { done <- tell(t, dir, nil, order{Op: "list"}).PID }()
		select {
		case <-done:
			t.Error("the call was taken without a descriptor")
		case <-time.After(3 * scarcePause):
		}
		require.NoError(t, unix.Prlimit(pid, unix.RLIMIT_NOFILE, &before, nil))
		require.Equal(t, pid, <-done)
	}
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, end())
}

// TestPause: workers that are killed before they can do anything are started
// again and again, but not without end in an instant.
func TestPause(t *testing.T) {
	dir := t.TempDir()
	k, err := newKeeper(dir)
	require.NoError(t, err)
	defer k.close()
	own, err := os.Readlink(self)
	require.NoError(t, err)
	const script = `echo >>"$4/starts"; [ $(wc -l <"$4/starts") -gt 6 ] && exec "$@"; kill -9 $$`
	k.start = program{"/bin/sh", []string{"/bin/sh", "-c", script, "sh", own, Arg, roleWork, dir}}
	began := time.Now()
	done := make(chan error, 1)
	go func() { done <- k.run(nil, nil) }()
	tell(t, dir, nil, order{Op: "list"})
	require.Greater(t, time.Since(began), 630*time.Millisecond, "10 + 20 + 40 + 80 + 160 + 320 ms")
	before := tell(t, dir, nil, order{Op: "list"}).PID
	require.NoError(t, unix.Kill(before, unix.SIGKILL))
	require.Eventually(t, func() bool { return unix.Kill(before, 0) == unix.ESRCH }, 10*time.Second, time.Millisecond)
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, <-done)
	require.Zero(t, k.pause, "after a worker that was ready")
}

// TestNextFails: a program that cannot take over is not tried twice.
func TestNextFails(t *testing.T) {
	dir, _, end := inTest(t)
	tell(t, dir, nil, order{Op: "store", Name: "x", Text: "kept"})
	for _, argv := range [][]string{{"/nowhere"}, {"/bin/false"}, {"/bin/true"}, {"/bin/sh", "-c", "exit 10"}} {
		tell(t, dir, nil, order{Op: "next", Argv: argv})
		tell(t, dir, nil, order{Op: "exit", Exit: ExitNext})
		require.Equal(t, map[string]string{"x": "kept"}, tell(t, dir, nil, order{Op: "list"}).Items)
	}
	tell(t, dir, nil, order{Op: "drop", Name: "x"})
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, end())
}

// TestNextGone: the program that was ready last comes after one that fails, even
// if its file has gone; and the keeper's own after one with a fault.
func TestNextGone(t *testing.T) {
	dir, _, end := inTest(t)
	tell(t, dir, nil, order{Op: "store", Name: "x", Text: "kept"})
	own, err := os.ReadFile(self)
	require.NoError(t, err)
	exe := t.TempDir() + "/other"
	require.NoError(t, os.WriteFile(exe, own, 0o755))
	tell(t, dir, nil, order{Op: "next", Argv: []string{exe}})
	tell(t, dir, nil, order{Op: "exit", Exit: ExitNext})
	program := func() string {
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", tell(t, dir, nil, order{Op: "list"}).PID))
		require.NoError(t, err)
		return target
	}
	require.Equal(t, exe, program())
	require.NoError(t, os.Remove(exe))
	tell(t, dir, nil, order{Op: "next", Argv: []string{"/bin/false"}})
	tell(t, dir, nil, order{Op: "exit", Exit: ExitNext})
	require.Equal(t, exe+" (deleted)", program())
	killed(t, tell(t, dir, nil, order{Op: "list"}).PID)
	require.Equal(t, exe+" (deleted)", program())
	tell(t, dir, nil, order{Op: "exit", Exit: 3}) // it has a fault
	require.NotContains(t, program(), exe)
	tell(t, dir, nil, order{Op: "drop", Name: "x"})
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, end())
}

// TestDeaf: a worker that does not read what there is keeps the keeper only
// until it dies, or has been silent for too long.
func TestDeaf(t *testing.T) {
	for _, argv := range [][]string{{"/bin/false"}, {"/bin/sleep", "1000"}} {
		t.Run(argv[0], func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			k, err := newKeeper(dir)
			require.NoError(t, err)
			defer k.close()
			k.start, k.pulse, k.silence = program{argv[0], argv}, 20*time.Millisecond, 3*time.Second
			const items = 1000 // more than a socket takes
			for i := range items {
				fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
				require.NoError(t, err)
				k.items[fmt.Sprint("x/", i)] = item{fds: []int{fd}}
			}
			done := make(chan error, 1)
			go func() { done <- k.run(nil, nil) }()
			require.Len(t, tell(t, dir, nil, order{Op: "list"}).Items, items)
			tell(t, dir, nil, order{Op: "drop", Name: "x"})
			tell(t, dir, nil, order{Op: "exit"})
			require.NoError(t, <-done)
		})
	}
}

// TestNamed: a program that is replaced by itself has a file.
func TestNamed(t *testing.T) {
	own, err := os.Readlink(self)
	require.NoError(t, err)
	for _, tc := range []struct{ in, want []string }{
		{nil, nil},
		{[]string{"/bin/other", "arg"}, []string{"/bin/other", "arg"}},
		{Self(), []string{own}},
		{append(Self(), "arg"), []string{own, "arg"}},
	} {
		got, err := Named(tc.in)
		require.NoError(t, err)
		require.Equal(t, tc.want, got)
	}
	// One whose file is replaced while it runs.
	program, err := os.ReadFile(self)
	require.NoError(t, err)
	exe := t.TempDir() + "/program"
	require.NoError(t, os.WriteFile(exe, program, 0o755))
	cmd := exec.Command(exe, "-test.run=TestNamedGone$", "-test.v")
	cmd.Env = append(os.Environ(), "LAYERFS_TEST_GONE="+exe)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), "--- PASS: TestNamedGone")
}

// TestNamedGone is what TestNamed starts, with a program that may be removed.
func TestNamedGone(t *testing.T) {
	_, err := Named(Self())
	require.NoError(t, err)
	exe := os.Getenv("LAYERFS_TEST_GONE")
	if exe == "" {
		return
	}
	require.NoError(t, os.Remove(exe))
	_, err = Named(Self())
	require.ErrorIs(t, err, os.ErrNotExist)
	require.NoError(t, os.WriteFile(exe+" (deleted)", nil, 0o755))
	_, err = Named(Self())
	require.ErrorIs(t, err, os.ErrNotExist)
}

// TestStart: callers that come at once get one helper, which is no child of
// theirs, and which ends when its worker does.
func TestStart(t *testing.T) {
	// Longer than an address of a socket may be.
	dir := t.TempDir() + "/" + strings.Repeat("long", 30)
	var mu sync.Mutex
	var pids []int
	var wg sync.WaitGroup
	// The end of this pipe is seen when nobody has it open any more.
	var open [2]int
	require.NoError(t, unix.Pipe2(open[:], unix.O_NONBLOCK))
	defer unix.Close(open[0])
	for range 4 {
		wg.Go(func() {
			a := tell(t, dir, Self(), order{Op: "list"})
			mu.Lock()
			defer mu.Unlock()
			pids = append(pids, a.PID)
		})
	}
	wg.Wait()
	require.NoError(t, unix.Close(open[1]))
	require.Eventually(t, func() bool { // starters may still end
		n, err := unix.Read(open[0], make([]byte, 1))
		return n == 0 && err == nil
	}, 10*time.Second, 10*time.Millisecond, "a descriptor of the program lives on")
	slices.Sort(pids)
	require.Len(t, slices.Compact(pids), 1)
	require.NotEqual(t, os.Getpid(), parent(t, parent(t, pids[0])), "the keeper's parent")
	for _, name := range []string{socketName, lockName, logName} {
		fi, err := os.Stat(dir + "/" + name)
		require.NoError(t, err)
		assert.Zero(t, fi.Mode().Perm()&0o077, name)
	}
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, Gone(t.Context(), dir))
	_, err := Dial(t.Context(), dir, nil)
	require.ErrorIs(t, err, ErrNone)
}

// TestVersion asks programs for it.
func TestVersion(t *testing.T) {
	got, err := Version(t.Context(), Self(), "/nowhere")
	require.NoError(t, err)
	require.Equal(t, 7, got)
	for want, command := range map[string][]string{
		"ask /bin/false":   {"/bin/false"},
		"ask /nowhere":     {"/nowhere"},
		"/bin/echo is no":  {"/bin/echo", "3"},
		"/bin/true is no ": {"/bin/true"},
	} {
		_, err := Version(t.Context(), command, "/nowhere")
		require.ErrorContains(t, err, want)
	}
}

// TestSurroundings: of the environment a helper gets what it needs, and its
// command may choose the rest.
func TestSurroundings(t *testing.T) {
	t.Setenv("SECRET", "of the program")
	t.Setenv("GOGC", "77")
	dir := t.TempDir()
	own, err := os.Readlink(self)
	require.NoError(t, err)
	const adjust = `echo 321 >/proc/self/oom_score_adj; exec "$@"`
	a := tell(t, dir, []string{"/bin/sh", "-c", adjust, "sh", own}, order{Op: "list"})
	require.NotContains(t, a.Text, "SECRET")
	require.Contains(t, a.Text, "GOGC=77")
	for _, pid := range []int{a.PID, a.Keeper} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid))
		require.NoError(t, err)
		require.Equal(t, "321\n", string(b))
	}
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, Gone(t.Context(), dir))
}

// TestCallerGone: a keeper goes on if the one who started it does not listen.
func TestCallerGone(t *testing.T) {
	dir := t.TempDir()
	r, w, err := os.Pipe()
	require.NoError(t, err)
	require.NoError(t, r.Close())
	cmd := exec.Command(self, Arg, roleKeep, dir)
	cmd.Stdout = w
	require.NoError(t, cmd.Start())
	require.NoError(t, w.Close())
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	var pid int
	require.Eventually(t, func() bool {
		c, err := Dial(t.Context(), dir, nil)
		if err != nil {
			require.ErrorIs(t, err, ErrNone)
			return false
		}
		c.Close()
		pid = tell(t, dir, nil, order{Op: "list"}).PID
		return true
	}, 20*time.Second, 10*time.Millisecond)
	require.Equal(t, cmd.Process.Pid, parent(t, pid))
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, <-done)
}

func parent(t *testing.T, pid int) (parent int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	_, rest, _ := strings.Cut(string(status), "\nPPid:")
	_, err = fmt.Sscan(rest, &parent)
	require.NoError(t, err)
	return parent
}

// TestBacklog: who calls a helper that takes no more calls waits no longer than
// wanted, and starts no other.
func TestBacklog(t *testing.T) {
	dir := t.TempDir()
	s, err := listen(dir)
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, unix.Listen(int(s.Fd()), 0)) // one may wait
	c, err := Dial(t.Context(), dir, nil)
	require.NoError(t, err)
	defer c.Close()
	enough := errors.New("enough")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 1500*time.Millisecond, enough)
	defer cancel()
	_, err = Dial(ctx, dir, []string{"/nowhere"})
	require.ErrorIs(t, err, enough)
	listener := int(s.Fd())
	accepted := make(chan error)
	go func() {
		time.Sleep(100 * time.Millisecond)
		fd, _, err := unix.Accept(listener)
		unix.Close(fd)
		accepted <- err
	}()
	later, err := Dial(t.Context(), dir, nil)
	require.NoError(t, err)
	later.Close()
	require.NoError(t, <-accepted)
}

// TestTrimLog: a log does not grow without end, and its end is kept. What writes
// to it goes on in the same file.
func TestTrimLog(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, trimLog(dir, os.Stderr), "no log")
	f, err := sys.OpenLog(dir+"/"+logName, maxLog)
	require.NoError(t, err)
	defer f.Close()
	read := func(name string) string {
		b, err := os.ReadFile(dir + "/" + name)
		require.NoError(t, err)
		return string(b)
	}
	for _, fill := range []string{"a", "b"} {
		text := strings.Repeat(fill, maxLog)
		_, err = f.WriteString(text)
		require.NoError(t, err)
		require.NoError(t, trimLog(dir, f))
		require.Equal(t, maxLog, len(read(logName)), "as long as it may be")
		_, err = f.WriteString("end")
		require.NoError(t, err)
		other, err := os.Create(dir + "/other")
		require.NoError(t, err)
		require.NoError(t, trimLog(dir, other))
		require.NoError(t, other.Close())
		require.Equal(t, maxLog+3, len(read(logName)), "not what standard error is")
		require.NoError(t, trimLog(dir, f))
		require.Empty(t, read(logName))
		require.Equal(t, text[3:]+"end", read(logName+".old"))
		_, err = f.WriteString("later")
		require.NoError(t, err)
		require.Equal(t, "later", read(logName))
		require.NoError(t, f.Truncate(0))
	}
}

// TestStartFails tells what the helper says.
func TestStartFails(t *testing.T) {
	for name, command := range map[string][]string{
		"missing": {"/nowhere/helper"},
		"fails":   {"/bin/sh", "-c", "echo reason; exit 3"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Dial(t.Context(), t.TempDir(), command)
			require.ErrorContains(t, err, map[string]string{"missing": "no such file", "fails": "reason"}[name])
		})
	}
	// One that does no work at all must not be started for ever.
	_, err := Dial(t.Context(), t.TempDir(), []string{"/bin/true"})
	require.ErrorContains(t, err, "does not stay")
	// A program that does not know that it is a helper starts no other.
	_, err = Dial(t.Context(), t.TempDir(), []string{"/proc/self/exe", "-test.run=TestNoHelper$"})
	require.ErrorContains(t, err, "does not call Main")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(io.ErrClosedPipe)
	_, err = Dial(ctx, t.TempDir(), Self())
	require.ErrorIs(t, err, io.ErrClosedPipe)
}

// TestNoHelper is what TestStartFails starts. In a test run of its own it only
// starts and ends a helper.
func TestNoHelper(t *testing.T) {
	dir := t.TempDir()
	c, err := Dial(t.Context(), dir, Self())
	if os.Getenv(helperEnv) != "" {
		require.ErrorContains(t, err, "does not call Main")
		t.Fatal(err) // for the one who started this
	}
	require.NoError(t, err)
	require.NoError(t, c.Close())
	tell(t, dir, nil, order{Op: "exit"})
	require.NoError(t, Gone(t.Context(), dir))
}

// TestBigMessage: what does not fit into a socket goes through memory.
func TestBigMessage(t *testing.T) {
	a, b, err := pair()
	require.NoError(t, err)
	ca, err := NewConn(a)
	require.NoError(t, err)
	defer ca.Close()
	cb, err := NewConn(b)
	require.NoError(t, err)
	defer cb.Close()
	for _, n := range []int{0, maxInline - 100, maxInline, 10 << 20} {
		want := order{Bytes: bytes.Repeat([]byte("\xff"), max(n*3/4, 1))}
		null, err := os.Open(os.DevNull)
		require.NoError(t, err)
		require.NoError(t, ca.Send(want, int(null.Fd()), int(null.Fd())))
		null.Close()
		var got order
		fds, err := cb.Recv(&got)
		require.NoError(t, err)
		require.Len(t, fds, 2)
		CloseAll(fds)
		require.Equal(t, want, got)
	}
	require.ErrorIs(t, ca.Send(order{}, make([]int, maxFDs+1)...), unix.E2BIG)
	require.NoError(t, ca.Close())
	_, err = cb.Recv(new(order))
	require.ErrorIs(t, err, io.EOF)
}
