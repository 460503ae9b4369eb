package drivertest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/layerfs/layerfs"
)

// childEnv tells a second process of the test program which driver to open:
// name of the harness, ":" and the root.
const childEnv = "LAYERFS_DRIVERTEST_CHILD"

// Child must be called first in TestMain, with all harnesses of the test
// program. In the test itself it returns at once. In a process that a case has
// started to be a second user of a root it works for that case and exits.
func Child(harnesses ...Harness) {
	name, root, ok := strings.Cut(os.Getenv(childEnv), ":")
	if !ok {
		return
	}
	for _, h := range harnesses {
		if h.Name != name {
			continue
		}
		d, err := h.New(root)
		if err != nil {
			fmt.Println("error", strconv.Quote(err.Error()))
			os.Exit(3)
		}
		fmt.Println("ready")
		serve(d, os.Stdin, os.Stdout)
		os.Exit(0)
	}
	fmt.Println("error", strconv.Quote("no harness "+name))
	os.Exit(3)
}

// serve runs commands, one a line, until the input ends.
func serve(d layerfs.Driver, in io.Reader, out io.Writer) {
	ctx := context.Background()
	for scan := bufio.NewScanner(in); scan.Scan(); {
		words := append(strings.Fields(scan.Text()), "", "", "")
		var text string
		var err error
		switch id := words[1]; words[0] {
		case "create":
			err = d.Create(ctx, id, words[2], nil)
		case "get":
			text, err = d.Get(ctx, id, nil)
		case "persist":
			text, err = d.Get(ctx, id, &layerfs.GetOptions{Persist: true})
		case "put":
			err = d.Put(ctx, id)
		case "remove":
			err = d.Remove(ctx, id)
		case "close":
			err = d.Close()
		case "churn":
			err = churnForever(ctx, d, id, out)
		default:
			err = fmt.Errorf("[bug] command %q", scan.Text())
		}
		if err != nil {
			fmt.Fprintln(out, "error", strconv.Quote(err.Error()))
			continue
		}
		fmt.Fprintln(out, "ok", strconv.Quote(text))
	}
}

// child is a second process.
type child struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

// child starts a second process on a root.
func (e *env) child(root string) (*child, error) {
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), childEnv+"="+e.h.Name+":"+root)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{cmd: cmd, in: in, out: bufio.NewScanner(out)}
	e.Cleanup(func() { c.kill() })
	if line, err := c.read(); err != nil || line != "ready" {
		c.kill()
		return nil, fmt.Errorf("second process says %q, %v; does TestMain call drivertest.Child?", line, err)
	}
	return c, nil
}

func (c *child) read() (string, error) {
	if !c.out.Scan() {
		return "", errors.Join(errors.New("the second process ended"), c.out.Err())
	}
	return c.out.Text(), nil
}

// do runs a command and returns what it says, or its error as text.
func (c *child) do(format string, args ...any) (string, error) {
	if _, err := fmt.Fprintf(c.in, format+"\n", args...); err != nil {
		return "", err
	}
	line, err := c.read()
	if err != nil {
		return "", err
	}
	what, quoted, _ := strings.Cut(line, " ")
	text, err := strconv.Unquote(quoted)
	if err != nil {
		return "", fmt.Errorf("second process says %q", line)
	}
	if what != "ok" {
		return "", errors.New(text)
	}
	return text, nil
}

// kill ends it as a crash does. It may be called again.
func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

// exit lets it end by itself.
func (c *child) exit() error {
	c.in.Close()
	return c.cmd.Wait()
}

func processCases() []testCase {
	return []testCase{
		{name: "TwoProcesses", run: testTwoProcesses},
		{name: "KilledHolder", run: testKilledHolder},
		{name: "ExitedHolder", run: testExitedHolder},
		{name: "ClosedHolder", run: testClosedHolder},
		{name: "PersistentHolder", run: testPersistentHolder},
		{name: "KilledWorker", run: testKilledWorker},
	}
}

func testTwoProcesses(e *env) error {
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	c, err := e.child(e.root)
	if err != nil {
		return err
	}
	path, err := e.d.Get(e.ctx, "a", nil)
	if err != nil {
		return err
	}
	if got, err := c.do("get a"); err != nil || got != path {
		return fmt.Errorf("second process: Get = %q, %v; want %q", got, err, path)
	}
	if err := e.d.Put(e.ctx, "a"); err != nil {
		return err
	}
	if err := dirHolds(path, "f=1"); err != nil {
		return fmt.Errorf("while a second process holds it: %w", err)
	}
	if info, err := e.d.Stat(e.ctx, "a", nil); err != nil || !info.Mounted {
		return fmt.Errorf("Stat = %+v, %v; want Mounted", info, err)
	}
	if err := errors.Join(
		want(e.d.Remove(e.ctx, "a"), "remove", "a", layerfs.ErrInUse),
		want(e.d.Put(e.ctx, "a"), "put", "a", layerfs.ErrNotHeld),
	); err != nil {
		return err
	}
	if !e.d.Features().LiveBase {
		if err := want(e.d.Create(e.ctx, "b", "a", nil), "create", "b", layerfs.ErrInUse); err != nil {
			return err
		}
	}
	if _, err := c.do("put a"); err != nil {
		return err
	}
	if _, err := c.do("create b a"); err != nil {
		return err
	}
	if err := want(e.d.Remove(e.ctx, "a"), "remove", "a", layerfs.ErrInUse); err != nil {
		return err
	}
	if err := e.holds(e.d, "b", "f=1"); err != nil {
		return err
	}
	if _, err := c.do("remove b"); err != nil {
		return err
	}
	if err := want(e.d.Remove(e.ctx, "b"), "remove", "b", layerfs.ErrNotExist); err != nil {
		return err
	}
	return c.exit()
}

// held makes a frozen and a writable layer and lets a second process hold them.
func (e *env) held() (*child, error) {
	if err := errors.Join(e.create("a", "", "file f 1"), e.create("b", "a", "file g 2")); err != nil {
		return nil, err
	}
	c, err := e.child(e.root)
	if err != nil {
		return nil, err
	}
	for _, id := range []string{"a", "b"} {
		if _, err := c.do("get %s", id); err != nil {
			return nil, err
		}
		if info, err := e.d.Stat(e.ctx, id, nil); err != nil || !info.Mounted {
			return nil, fmt.Errorf("Stat = %+v, %v; want Mounted", info, err)
		}
	}
	return c, nil
}

// released makes sure that what a process held is free, also without opening
// the driver again, and that opening it again leaves no mount.
func (e *env) released() error {
	for _, id := range []string{"a", "b"} {
		if info, err := e.d.Stat(e.ctx, id, nil); err != nil || info.Mounted {
			return fmt.Errorf("its process is gone, but Stat = %+v, %v", info, err)
		}
	}
	d, err := e.open(e.root)
	if err != nil {
		return err
	}
	left, err := mountsBelow(e.root)
	if err != nil || len(left) > 0 {
		return fmt.Errorf("mounts after the driver was opened again: %q, %v", left, err)
	}
	if err := errors.Join(e.holds(d, "b", "f=1", "g=2"), e.holds(d, "a", "f=1")); err != nil {
		return err
	}
	return errors.Join(d.Remove(e.ctx, "b"), d.Remove(e.ctx, "a"))
}

func testKilledHolder(e *env) error {
	c, err := e.held()
	if err != nil {
		return err
	}
	c.kill()
	return e.released()
}

func testExitedHolder(e *env) error {
	c, err := e.held()
	if err != nil {
		return err
	}
	if err := c.exit(); err != nil {
		return err
	}
	return e.released()
}

// testClosedHolder: what is held lasts after Close until the process ends.
func testClosedHolder(e *env) error {
	c, err := e.held()
	if err != nil {
		return err
	}
	if _, err := c.do("close"); err != nil {
		return err
	}
	if err := want(e.d.Remove(e.ctx, "b"), "remove", "b", layerfs.ErrInUse); err != nil {
		return err
	}
	if err := c.exit(); err != nil {
		return err
	}
	// Without opening again this time: Remove has to see that nobody holds it.
	return errors.Join(e.d.Remove(e.ctx, "b"), e.d.Remove(e.ctx, "a"))
}

func testPersistentHolder(e *env) error {
	if err := e.create("a", "", "file f 1"); err != nil {
		return err
	}
	c, err := e.child(e.root)
	if err != nil {
		return err
	}
	path, err := c.do("persist a")
	if err != nil {
		return err
	}
	c.kill()
	d, err := e.open(e.root)
	if err != nil {
		return err
	}
	if err := dirHolds(path, "f=1"); err != nil {
		return fmt.Errorf("a persistent Get after its process was killed: %w", err)
	}
	if err := want(d.Remove(e.ctx, "a"), "remove", "a", layerfs.ErrInUse); err != nil {
		return err
	}
	if err := d.Put(e.ctx, "a"); err != nil {
		return err
	}
	d.note("a", 1) // the Get was not made through this driver
	return d.Remove(e.ctx, "a")
}

// churnForever makes, fills and removes layers until the process is killed. It
// says what it is about to do, so that its end can be judged.
func churnForever(ctx context.Context, d layerfs.Driver, seed string, out io.Writer) error {
	n, err := strconv.ParseUint(seed, 10, 64)
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(n, 1))
	fmt.Fprintln(out, "ok", `""`)
	var live []string
	for i := 0; ; i++ {
		if len(live) > 4 {
			id := live[len(live)-1]
			live = live[:len(live)-1]
			fmt.Fprintln(out, "remove", id)
			if err := d.Remove(ctx, id); err != nil {
				return err
			}
			continue
		}
		id := fmt.Sprintf("c%s-%d", seed, i)
		parent := "base"
		hold := rng.IntN(2) == 0
		if !hold && len(live) > 0 && rng.IntN(2) == 0 {
			parent = live[len(live)-1]
		}
		if err := d.Create(ctx, id, parent, nil); err != nil {
			return err
		}
		if _, err := d.Apply(ctx, id, bytes.NewReader(churnTar(id)), ownFiles()); err != nil {
			return err
		}
		if _, err := d.Get(ctx, id, nil); err != nil {
			return err
		}
		if !hold {
			if err := d.Put(ctx, id); err != nil {
				return err
			}
			live = append(live, id)
		}
		fmt.Fprintln(out, "made", id)
	}
}

func churnTar(id string) []byte {
	var entries []entry
	for i := range 20 {
		entries = append(entries, entry{name: fmt.Sprintf("%s/f%02d", id, i), body: strings.Repeat(id, 100)})
	}
	return makeTar(entries...)
}

// testKilledWorker kills a process that is hard at work, again and again. What
// is in the list afterwards has to be whole or to say that it is not, what was
// said to be made has to be there, what was removed must not come back, and
// everything can be removed.
func testKilledWorker(e *env) error {
	if err := e.create("base", "", "file f 1"); err != nil {
		return err
	}
	if err := e.d.Close(); err != nil {
		return err
	}
	rounds := 12
	if raceEnabled {
		rounds = 4
	}
	for round := range rounds {
		if err := e.killWorker(uint64(round)); err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
	}
	return nil
}

func (e *env) killWorker(seed uint64) error {
	c, err := e.child(e.root)
	if err != nil {
		return err
	}
	if _, err := c.do("churn %d", seed); err != nil {
		return err
	}
	made, removed := map[string]bool{}, map[string]bool{}
	timer := time.AfterFunc(time.Duration(5+seed*7)*time.Millisecond, func() { _ = c.cmd.Process.Kill() })
	defer timer.Stop()
	for c.out.Scan() {
		what, id, _ := strings.Cut(c.out.Text(), " ")
		switch what {
		case "made":
			made[id] = true
		case "remove":
			removed[id] = true
		default:
			c.kill()
			return fmt.Errorf("worker: %s", c.out.Text())
		}
	}
	c.kill()
	d, err := e.open(e.root)
	if err != nil {
		return err
	}
	defer d.Close()
	if problems, err := layerfs.Check(e.ctx, d); err == nil {
		for _, p := range problems {
			if p.Repair != "" {
				return fmt.Errorf("after opening, Check finds %+v", p)
			}
		}
	} else if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	infos, err := d.List(e.ctx)
	if err != nil {
		return err
	}
	for _, info := range infos {
		if info.ID == "base" {
			continue
		}
		if made[info.ID] && !removed[info.ID] && info.Incomplete != "" {
			return fmt.Errorf("%s was made, but is %s", info.ID, info.Incomplete)
		}
		delete(made, info.ID)
		if info.Incomplete != "" {
			continue
		}
		err := e.with(d, info.ID, nil, func(path string) error {
			entries, err := os.ReadDir(path + "/" + info.ID)
			if err == nil && len(entries) != 20 {
				err = fmt.Errorf("%s has %d of 20 files", info.ID, len(entries))
			}
			if os.IsNotExist(err) {
				err = nil // created, and not applied to yet
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	for id := range made {
		if !removed[id] {
			return fmt.Errorf("%s was made, but is not in the list", id)
		}
	}
	for i := len(infos) - 1; i >= 0; i-- {
		if infos[i].ID == "base" {
			continue
		}
		if err := d.Remove(e.ctx, infos[i].ID); err != nil {
			return err
		}
	}
	return e.holds(d, "base", "f=1")
}
